"""Sets of ImageNet's classes by name, and the users' own out of a YAML file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from utils.errors import UserError
from utils.parsing import parse_yaml
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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


# The 100 classes of IDC's list, in its order; the first ten are ImageIDC.
# Source: Efficient-Dataset-Condensation (Kim et al., ICML 2022).
_IMAGENET100 = _numbers(
    """
    452 64 374 236 993 176 882 904 503 74 57 959 953 508 872 228 122 421 599 858 157 449 994 608 151 209 15 876 246
    766 455 857 131 119 234 90 45 936 479 272 665 653 659 158 960 765 908 703 407 560 317 938 724 748 331 619 120
    267 155 708 368 772 167 494 180 431 342 854 305 54 268 667 166 277 662 798 313 498 299 222 682 593 775 674 592
    137 758 717 606 281 796 211 620 830 544 275 242 570 99 169
    """
)
LISTS = {"idc": _IMAGENET100[:10], "imagenet100": _IMAGENET100}
# Tiny ImageNet's 200 classes, in the order of their WordNet names.
TINY = _numbers(
    """
    1 25 30 32 50 61 69 71 75 76 79 99 105 107 109 113 114 115 122 123 128 145 146 149 151 187 207 208 235 267 281
    283 285 286 291 294 301 308 309 311 313 314 315 319 323 325 329 338 341 345 347 349 353 354 365 367 372 386 387
    398 400 406 411 414 421 424 425 427 430 435 436 437 438 440 445 447 448 457 458 462 463 466 467 470 471 474 480
    485 488 492 496 500 508 509 511 517 525 526 532 542 543 557 562 565 567 568 570 573 576 604 605 612 614 619 621
    625 627 635 645 652 655 675 677 678 682 683 687 704 707 716 720 731 733 734 735 737 739 744 747 758 760 761 765
    768 774 779 781 786 801 806 808 811 815 817 821 826 837 839 842 845 849 850 853 862 866 873 874 877 879 887 888
    890 899 900 909 910 917 923 924 928 929 932 935 938 945 947 950 951 954 957 962 963 964 967 970 972 973 975 978
    988
    """
)


@cache
def wordnet_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """ImageNet's 1000 classes in order: their WordNet names, such as n01440764, and what people call them."""
    labels = wordnet_labels()
    return tuple(labels), tuple(label.split(",")[0] for label in labels.values())


@cache
def wordnet_labels() -> dict[str, str]:
    """ImageNet's 1000 classes in order: WordNet name → all words for it, such as 'tench, Tinca tinca'."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}


def subset_classes(name: str, file: str = "") -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class ids of the subset `name`, and the classes' names, in the order of labels.

    file  YAML of further subsets, `name: [ids]`

    UserError for an unknown subset and for a file that holds anything else.
    """
    if name == ALL:
        return tuple(range(IMAGENET)), wordnet_names()[1]
    listed = LISTS | (read_subsets(file) if file else {})
    if name in listed:
        return listed[name], tuple(wordnet_names()[1][number] for number in listed[name])
    if name not in SUBSETS:
        known = [*SUBSETS, *listed, ALL]
        further = "" if file else "; --subsets FILE.yaml adds your own"
        raise UserError(f"unknown subset '{name}'{nearest(name, known)}; known: {', '.join(known)}{further}")
    return tuple(SUBSETS[name]), tuple(SUBSETS[name].values())


def read_subsets(file: str) -> dict[str, tuple[int, ...]]:
    """Subset name → class ids, out of a YAML file; UserError names what is wrong in it."""
    try:
        tree = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no subsets file {file}; correct --subsets") from None
    except IsADirectoryError:
        raise UserError(f"--subsets {file} is a folder; name a .yaml file in it") from None
    except ValueError as error:
        raise UserError(f"subsets file {file} is not valid YAML ({error})") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"subsets file {file} needs lines such as `mine: [0, 217, 482]`, a name and its class ids")
    found = {}
    for name, ids in tree.items():
        if name in SUBSETS or name in LISTS or name == ALL:
            raise UserError(f"subsets file {file}: '{name}' is a published subset; give yours another name")
        whole = isinstance(ids, list) and all(type(number) is int and 0 <= number < IMAGENET for number in ids)
        if not whole or not ids or len(set(ids)) != len(ids):
            raise UserError(f"subsets file {file}: '{name}' is {ids}; it must list different class ids from 0 to 999")
        found[str(name)] = tuple(ids)
    return found
