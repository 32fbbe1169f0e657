"""Drawn scenes, with captions or with labels: data sets that need no files, are made in a second and can be learned.

A scene is one to three coloured shapes, each in a quarter of its own, on a plain background. Its five captions word
colours, shapes, sizes, places and background differently, so text and image must really be matched. No scene occurs
twice, in one split or in two. Everything follows from a fixed seed and not from the run's: toy numbers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.captions import Annotations, DataConfig, PairData, clean_caption
from utils.rng import generator

HELD_OUT = 200  # images in val, and in test
CAPTIONS = 5
COLOURS = {
    "red": (222, 48, 52),
    "orange": (245, 138, 30),
    "yellow": (252, 212, 44),
    "green": (46, 168, 84),
    "blue": (40, 96, 224),
    "purple": (136, 62, 190),
    "pink": (246, 128, 182),
    "brown": (124, 76, 42),
}
BACKGROUNDS = {
    "white": (248, 248, 246),
    "grey": (164, 168, 172),
    "mint": (186, 232, 210),
    "cream": (250, 234, 200),
    "navy": (28, 36, 72),
    "black": (18, 18, 20),
}
PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
SIZES = {"small": 0.12, "large": 0.21}  # radius as a share of the image's side
WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
    "star": ("star", "star"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Folded into one tenth of the circle, a five-pointed star is one straight edge from tip to notch.
    sector = math.pi / 5
    angle, radius = np.arctan2(x, -y), np.hypot(x, y)
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    tip, notch = (0.0, 1.1), (0.48 * math.sin(sector), 0.48 * math.cos(sector))
    along = (notch[0] - tip[0], notch[1] - tip[1])
    across = (radius * np.sin(folded) - tip[0]) * -along[1] + (radius * np.cos(folded) - tip[1]) * along[0]
    return across / math.hypot(*along)


# Signed distance to the outline, negative inside, of each shape of radius 1; x grows to the right and y downwards.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.98,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.86,
    "triangle": lambda x, y: np.maximum(y - 0.75, (np.abs(x) * 1.75 - y - 1.05) / math.hypot(1.75, 1)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.26,
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 0.98, np.abs(y) - 0.32), np.maximum(np.abs(x) - 0.32, np.abs(y) - 0.98)
    ),
    "star": _star,
}


@dataclass(frozen=True)
class Thing:
    """One shape of a scene, by the words for it."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    background: str
    things: tuple[Thing, ...]


def toy_data(cfg: DataConfig, device: torch.device | str) -> PairData:
    """The toy set: `cfg.toy_images` train, 200 val and 200 test images of five captions each."""
    counts = {"test": HELD_OUT, "val": HELD_OUT, "train": cfg.toy_images}

    def scenes_of(split: str) -> list[Scene]:
        # Held-out scenes come first, so they are the same for any number of training images.
        start = sum(counts[name] for name in list(counts)[: list(counts).index(split)])
        stop = start + counts[split]
        if split == "train" and cfg.train_limit:
            stop = min(stop, start + cfg.train_limit)
        return draw_scenes(stop)[start:]

    def read(split: str) -> Annotations:
        scenes = scenes_of(split)
        rng = generator(0, "toy captions", split)
        captions = [clean_caption(text) for scene in scenes for text in describe(scene, rng)]
        image_of = [image for image in range(len(scenes)) for _ in range(CAPTIONS)]
        return Annotations(captions, image_of, [f"toy/{split}/{image}" for image in range(len(scenes))])

    def pictures(split: str, notes: Annotations) -> Drawings:
        return Drawings(draw(scenes_of(split), cfg.image_size, generator(0, "toy pixels", split)))

    return PairData("toy", read, pictures, not cfg.no_aug, device)


class Drawings:
    """Drawn images in memory, (N, 3, s, s) uint8.

    The train transform only shifts an image by up to a sixteenth of its side: crops, flips and RandAugment would move a
    'left' shape to the right or turn a 'large' one small, and make the captions false.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def plain(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def whole(self) -> Tensor:
        return self.images

    def augmented(self, indices: Tensor, rng: torch.Generator, device: torch.device | str) -> Tensor:
        size = self.images.shape[-1]
        reach = size // 16
        corners = torch.randint(2 * reach + 1, (len(indices), 2, 1), generator=rng) + torch.arange(size)
        rows, columns = corners[:, 0, :, None], corners[:, 1, None, :]
        padded = F.pad(self.images[indices].float(), (reach,) * 4, mode="replicate").to(torch.uint8)
        items = torch.arange(len(indices))[:, None, None]
        return padded.permute(0, 2, 3, 1)[items, rows, columns].permute(0, 3, 1, 2)

    def prepare(self) -> None:
        """All is at hand."""


def draw_scenes(count: int) -> list[Scene]:
    """The first `count` different scenes of the toy world."""
    rng = generator(0, "toy scenes")
    found: dict[Scene, None] = {}
    while len(found) < count:
        number = 1 + _pick(rng, 3)
        things = tuple(
            Thing(_word(rng, SHAPES), _word(rng, COLOURS), _word(rng, SIZES), list(PLACES)[place])
            for place in sorted(torch.randperm(len(PLACES), generator=rng)[:number].tolist())
        )
        found[Scene(_word(rng, BACKGROUNDS), things)] = None
    return list(found)


SHAPES_TESTED = 300  # test images of the labelled toy set


def draw_shapes(split: str, train: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, size, size) uint8 of one shape each, and which of SHAPES it is, (N,) long, in turn.

    split  "train" with `train` images, or "test" with 300, whatever the number of the others

    Colour, size, place, angle and background are drawn without regard to the shape.
    """
    scenes, labels = _shape_scenes(split, train)
    return draw(scenes, size, generator(0, "toy shapes pixels", split)), labels


def captioned_shapes(split: str, train: int, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """The scenes of `draw_shapes` from near, each shape filling its picture, and one true caption of each picture.

    A few of these are enough to tell the shapes apart, which a few of `draw_shapes` are not.
    """
    scenes, labels = _shape_scenes(split, train)
    wide = draw(scenes, 2 * size, generator(0, "toy shapes pixels", split))
    pictures = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
    for number, scene in enumerate(scenes):
        vertical, horizontal = scene.things[0].place.split()
        top, left = size * (vertical == "bottom"), size * (horizontal == "right")
        pictures[number] = wide[number, :, top : top + size, left : left + size]
    rng = generator(0, "toy shapes captions", split)
    return pictures, labels, [_caption(scene, rng) for scene in scenes]


def shape_sentences(count: int) -> list[str]:
    """`count` sentences like the captions of `captioned_shapes`, true of scenes of their own, which are not drawn."""
    scenes, _ = _shape_scenes("sentences", count)
    rng = generator(0, "toy shapes captions", "sentences")
    return [_caption(scene, rng) for scene in scenes]


def _caption(scene: Scene, rng: torch.Generator) -> str:
    """What there is to say of a shape from near."""
    (thing,) = scene.things
    size, shape = _word(rng, WORDS[thing.size]), _word(rng, WORDS[thing.shape])
    wordings = (
        f"a {size} {thing.colour} {shape} on {scene.background}.",
        f"on a {scene.background} background, a {size} {thing.colour} {shape}.",
        f"a {scene.background} picture of a {thing.colour} {shape}.",
    )
    return wordings[_pick(rng, len(wordings))].replace("a orange", "an orange").capitalize()


def _shape_scenes(split: str, count: int) -> tuple[list[Scene], Tensor]:
    """`count` scenes, but of test as many as ever."""
    rng = generator(0, "toy shapes", split)
    shapes = list(SHAPES)
    labels = torch.arange(SHAPES_TESTED if split == "test" else count) % len(shapes)
    scenes = [
        Scene(
            _word(rng, BACKGROUNDS),
            (Thing(shapes[label], _word(rng, COLOURS), _word(rng, SIZES), _word(rng, PLACES)),),
        )
        for label in labels.tolist()
    ]
    return scenes, labels


def describe(scene: Scene, rng: torch.Generator) -> list[str]:
    """Five captions of a scene; all name shapes and colours, each leaves out or adds something else."""

    def name(thing: Thing, *, sized: bool, placed: bool) -> str:
        size = f"{_word(rng, WORDS[thing.size])} " if sized else ""
        place = f" at {thing.place}" if placed else ""
        phrase = f"{size}{thing.colour} {_word(rng, WORDS[thing.shape])}{place}"
        return ("an " if phrase.startswith("orange") else "a ") + phrase

    def names(joint: str = " and ", **kind: bool) -> str:
        order = torch.randperm(len(scene.things), generator=rng).tolist()
        return joint.join(name(scene.things[i], **kind) for i in order)

    count = ("one shape", "two shapes", "three shapes")[len(scene.things) - 1]
    ground = scene.background
    return [
        f"{names(sized=True, placed=True)} on {ground}.".capitalize(),
        f"On a {ground} background, {names(' with ', sized=False, placed=True)}.",
        f"A {ground} picture of {count}: {names(', ', sized=True, placed=False)}.",
        f"There is {names(' next to ', sized=True, placed=True)}.",
        f"{count}, {names(', ', sized=True, placed=True)}, against {ground}.".capitalize(),
    ]


def draw(scenes: list[Scene], size: int, rng: torch.Generator) -> Tensor:
    """The pictures of scenes, (N, 3, size, size) uint8; `rng` nudges places, angles and shades."""
    images = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(scenes), 64):  # bounds the memory at 224 pixels
        part = scenes[start : start + 64]
        # Drawn for all three possible things, so that the chance of one scene does not hang on another's.
        nudges = torch.rand(len(part), 4, 4, generator=rng, dtype=torch.float64).numpy() * 2 - 1
        images[start : start + 64] = torch.from_numpy(_paint(part, size, nudges)).permute(0, 3, 1, 2)
    return images


def _paint(scenes: list[Scene], size: int, nudges: np.ndarray) -> np.ndarray:
    middle = (np.arange(size) + 0.5) / size
    ground = np.array([BACKGROUNDS[scene.background] for scene in scenes], dtype=np.float64)
    # A little darker towards the bottom, and not quite the same shade each time.
    shade = (1.04 - 0.1 * middle)[None, :, None, None] * (1 + 0.03 * nudges[:, 3, 0])[:, None, None, None]
    canvas = np.broadcast_to(ground[:, None, None] * shade, (len(scenes), size, size, 3)).copy()
    for slot in range(3):
        for shape, outline in SHAPES.items():
            drawn = [
                i for i, scene in enumerate(scenes) if slot < len(scene.things) and scene.things[slot].shape == shape
            ]
            if not drawn:
                continue
            things = [scenes[i].things[slot] for i in drawn]
            nudge = nudges[drawn, slot]
            centre = np.array([PLACES[thing.place] for thing in things]) + 0.02 * nudge[:, :2]
            radius = np.array([SIZES[thing.size] for thing in things])
            colour = np.array([COLOURS[thing.colour] for thing in things]) * (1 + 0.06 * nudge[:, 3:])
            cover = _cover(outline, centre, radius, 0.15 * nudge[:, 2], size)[..., None]
            canvas[drawn] += cover * (colour[:, None, None] - canvas[drawn])
    return canvas.clip(0, 255).round().astype(np.uint8)


def _cover(
    outline: Callable[[np.ndarray, np.ndarray], np.ndarray],
    centre: np.ndarray,
    radius: np.ndarray,
    angle: np.ndarray,
    size: int,
) -> np.ndarray:
    """How much of each pixel a shape covers, (n, size, size) from 0 to 1: its distance to the outline, in pixels."""
    middle = (np.arange(size) + 0.5) / size
    x = (middle[None, None, :] - centre[:, :1, None]) / radius[:, None, None]
    y = (middle[None, :, None] - centre[:, 1:, None]) / radius[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    distance = outline(cos * x + sin * y, cos * y - sin * x) * radius[:, None, None] * size
    return np.clip(0.5 - distance, 0, 1)


def _pick(rng: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (), generator=rng))


def _word(rng: torch.Generator, words: dict[str, object] | tuple[str, ...]) -> str:
    return list(words)[_pick(rng, len(words))]
