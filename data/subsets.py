"""Sets of ImageNet's classes by name, and the users' own out of a YAML file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.registry import nearest

IMAGENET = 1000  # classes; ids count them from 0 in the sorted order of their WordNet names (n01440764 is 0)
ALL = "all"
# Label k is the k-th. Source: mtt-distillation (Cazenavette et al., CVPR 2022).
SUBSETS: dict[str, dict[int, str]] = {
    "imagenette": {
        0: "tench",
        217: "English springer",
        482: "cassette player",
        491: "chain saw",
        497: "church",
        566: "French horn",
        569: "garbage truck",
        571: "gas pump",
        574: "golf ball",
        701: "parachute",
    },
    "imagewoof": {
        193: "Australian terrier",
        182: "border terrier",
        258: "Samoyed",
        162: "beagle",
        155: "Shih-Tzu",
        167: "English foxhound",
        159: "Rhodesian ridgeback",
        273: "dingo",
        207: "golden retriever",
        229: "Old English sheepdog",
    },
    "imagemeow": {
        281: "tabby",
        282: "tiger cat",
        283: "Persian",
        284: "Siamese",
        285: "Egyptian",
        291: "lion",
        292: "tiger",
        290: "jaguar",
        289: "snow leopard",
        287: "lynx",
    },
    "imagesquawk": {
        84: "peacock",
        130: "flamingo",
        88: "macaw",
        144: "pelican",
        145: "king penguin",
        22: "bald eagle",
        96: "toucan",
        9: "ostrich",
        100: "black swan",
        89: "cockatoo",
    },
    "imagefruit": {
        953: "pineapple",
        954: "banana",
        949: "strawberry",
        950: "orange",
        951: "lemon",
        957: "pomegranate",
        952: "fig",
        945: "bell pepper",
        943: "cucumber",
        948: "green apple",
    },
    "imageyellow": {
        309: "bee",
        986: "lady's slipper",
        954: "banana",
        951: "lemon",
        987: "corn",
        779: "school bus",
        599: "honeycomb",
        291: "lion",
        72: "garden spider",
        11: "goldfinch",
    },
}


@cache
def wordnet_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """ImageNet's 1000 classes in order: their WordNet names, such as n01440764, and what people call them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnids = tuple(info.label_names())
    return wnids, tuple(info.label_name_to_description(wnid).split(",")[0] for wnid in wnids)


def subset_classes(name: str, file: str = "") -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class ids of the subset `name`, and the classes' names, in the order of labels.

    file  YAML of further subsets, `name: [ids]`

    UserError for an unknown subset and for a file that holds anything else.
    """
    if name == ALL:
        return tuple(range(IMAGENET)), wordnet_names()[1]
    own = read_subsets(file) if file else {}
    if name in own:
        return own[name], tuple(wordnet_names()[1][number] for number in own[name])
    if name not in SUBSETS:
        known = [*SUBSETS, *own, ALL]
        further = "" if file else "; --subsets FILE.yaml adds your own"
        raise UserError(f"unknown subset '{name}'{nearest(name, known)}; known: {', '.join(known)}{further}")
    return tuple(SUBSETS[name]), tuple(SUBSETS[name].values())


def read_subsets(file: str) -> dict[str, tuple[int, ...]]:
    """Subset name → class ids, out of a YAML file; UserError names what is wrong in it."""
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no subsets file {file}; correct --subsets") from None
    except IsADirectoryError:
        raise UserError(f"--subsets {file} is a folder; name a .yaml file in it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"subsets file {file} is not valid YAML ({error})") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"subsets file {file} needs lines such as `mine: [0, 217, 482]`, a name and its class ids")
    found = {}
    for name, ids in tree.items():
        if name in SUBSETS or name == ALL:
            raise UserError(f"subsets file {file}: '{name}' is a published subset; give yours another name")
        whole = isinstance(ids, list) and all(type(number) is int and 0 <= number < IMAGENET for number in ids)
        if not whole or not ids or len(set(ids)) != len(ids):
            raise UserError(f"subsets file {file}: '{name}' is {ids}; it must list different class ids from 0 to 999")
        found[str(name)] = tuple(ids)
    return found
