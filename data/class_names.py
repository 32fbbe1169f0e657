"""The class names of CIFAR-10 and CIFAR-100, as the sets have them, and how to tell them in other spellings."""

from __future__ import annotations

import re
from functools import cache

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR = {"cifar10": tuple(_CIFAR10.split()), "cifar100": tuple(_CIFAR100.split())}


def cifar_class(dataset: str, name: str) -> str | None:
    """The class of cifar10 or cifar100 that `name` means, or None.

    CIFAR-100's own list of super-classes spells 24 classes unlike its files do: 'orchids' is orchid, 'lawn-mower'
    lawn_mower, 'maple' maple_tree, 'computer keyboard' keyboard. Its order is another one, too. RDED's scripts rename
    folders to the classes' numbers: 00003 is the fourth by name.
    """
    if re.fullmatch(r"\d{5}", name):
        return dict(enumerate(CIFAR[dataset])).get(int(name))
    word = _singular(name)
    known = _spellings(dataset)
    return known.get(word) or known.get(f"{word} tree") or known.get(word.removeprefix("computer "))


@cache
def _spellings(dataset: str) -> dict[str, str]:
    return {_singular(name): name for name in CIFAR[dataset]}


def _singular(name: str) -> str:
    """A name in small letters, its words parted by a space, without the ending of a plural (or what looks like one)."""
    plain = " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
    return plain[:-3] + "y" if plain.endswith("ies") else plain.removesuffix("s")
