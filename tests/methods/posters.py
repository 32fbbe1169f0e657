"""Layouts that the tests of posters share: the published ones and one small enough to work out by hand."""

import torch

from methods.poster_layout import GridConfig, Layout, plan

# width, height, patches across and down, classes across and down, side of an image
PUBLISHED = {
    "CIFAR10": (153, 60, 16, 6, 5, 2, 32),
    "CIFAR100": (303, 303, 20, 20, 10, 10, 32),
    "CUB200": (610, 302, 60, 30, 20, 10, 32),
    "Tiny": (1211, 608, 40, 20, 20, 10, 64),
}


def laid(width: int, height: int, nx: int, ny: int, cx: int, cy: int, size: int, order=None, **areas: int) -> Layout:
    """A layout by its numbers; classes in order, row by row, unless told."""
    counts = {"patch_num_x": nx, "patch_num_y": ny, "poster_class_num_x": cx, "poster_class_num_y": cy}
    cfg = GridConfig(poster_width=width, poster_height=height, **counts, **areas)
    return plan(cfg, size, torch.arange(cx * cy).view(cy, cx) if order is None else torch.tensor(order))


def published(name: str) -> Layout:
    return laid(*PUBLISHED[name])


def toy(side: int = 6) -> Layout:
    """2 x 2 classes with areas of 4 x 4, and 3 x 3 patches of 4 x 4."""
    return laid(side, side, 3, 3, 2, 2, 4)
