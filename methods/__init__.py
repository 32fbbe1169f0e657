"""The systems by name, imported only when asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from utils.errors import UserError
from utils.registry import nearest

# name → (module, what it distils)
METHODS = {
    "vldd": ("methods.vldd", "image–text pairs by matching trajectories"),
    "mtt": ("methods.mtt", "class images and textures by matching trajectories"),
    "podd": ("methods.podd", "one poster for a whole data set"),
    "vlcp": ("methods.vlcp", "class images that a diffusion model draws from prototypes and captions"),
    "dimefm": ("methods.dimefm", "a small CLIP from unpaired images and sentences"),
}


def get_method(name: str) -> ModuleType:
    """The module of a system: CONFIGS (verb → config class), the verbs `buffer`, `distill`, `evaluate`, and `recorded`.

    `preset(argv)`, where it has that, gives a command's values below those of YAML and flags; `SHARED` are the verbs
    that several processes can do together. UserError for a name that is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'{nearest(name, METHODS)}; known: {', '.join(METHODS)}")
    return importlib.import_module(METHODS[name][0])
