"""Published weights: from a file, the local cache or the hub; what is not there is a one-line error, at once."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from utils.errors import UserError, first_line
from utils.files import load_tensors, load_vectors, read_json
from utils.parsing import is_plain

T = TypeVar("T")
# For `from_pretrained`: without it, some classes ask at the terminal whether to run code that comes with a model.
NO_CODE = {"trust_remote_code": False}


def hub_reachable(patience: float = 5.0) -> bool:
    """Whether the model hub answers within `patience` seconds.

    Asked before any download, because the hub's own client tries for most of a minute before it gives up.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=patience)
    except urllib.error.HTTPError:
        return True  # it answered
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answered; the hub's client brings its own certificates
    except (OSError, ValueError):
        return False
    return True


def from_cache_or_hub(load: Callable[[bool], T], what: str, remedy: str) -> T:
    """`load(True)`, which may use local files only, else `load(False)`, which may use the hub.

    UserError, quickly, where neither has `what`; it ends in `remedy`.
    """
    # The libraries behind `load` raise dozens of kinds of errors for weights that are missing, damaged or forbidden.
    try:
        return load(True)
    except UserError:  # ours, of a file that is there
        raise
    except Exception:
        if not hub_reachable():
            raise UserError(f"{what} are not here and the hub is out of reach; {remedy}") from None
    try:
        return load(False)
    except Exception as error:
        raise UserError(f"{what} cannot be had from the hub ({first_line(error)}); {remedy}") from None


def from_folder_or_hub(load: Callable[[bool], T], source: str, role: str, what: str, remedy: str) -> T:
    """`load(True)` where `source` is a folder, with UserError naming its `role`; else `from_cache_or_hub`."""
    if not Path(source).is_dir():
        return from_cache_or_hub(load, what, remedy)
    try:
        return load(True)
    except Exception as error:  # the library raises dozens of kinds for a folder that is not what it should be
        why = _damage(Path(source)) or first_line(error)
        raise UserError(f"{role} folder {source} cannot be loaded ({why})") from None


def _damage(folder: Path) -> str:
    """Which file below a folder is no JSON or no safetensors, though its name says so; the library's error does not
    tell."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (ValueError, RecursionError, SafetensorError) as error:
            return f"its {path.relative_to(folder).as_posix()} is damaged: {first_line(error)}; restore that file"
    return ""


@contextmanager
def quiet_transformers(bars: bool = False) -> Iterator[None]:
    """Within the block the transformers library says nothing short of errors, nor does Python warn; `bars` leaves it
    the progress bars of downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars and not bars:
            logging.enable_progress_bar()


def load_transformer(kind: Any, source: str, local: bool, **options: Any) -> nn.Module:
    """`kind.from_pretrained(source)` of the transformers library; ValueError where its weights lack one that is read.

    The library itself only warns of such weights and draws them by chance; and it lists, line by line, what of a whole
    CLIP its text side has no use for.
    """
    check_index(Path(source) / options.get("subfolder", ""))
    options |= NO_CODE | {"local_files_only": local, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with quiet_transformers(bars=not local):
        net, report = kind.from_pretrained(source, **options)
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"its {name} has shape {tuple(found)}, not {tuple(wanted)}")
    # A pooler above the last layer is not read.
    for name in sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(f"its weights lack {name}")
    return net


def check_index(folder: Path) -> None:
    """ValueError where the index of the weights in a folder, if there is one, names files that are not beside it."""
    for path in sorted(folder.glob("*.index.json")):
        index = read_json(path, "index of weights")
        shards = index.get("weight_map") if isinstance(index, dict) else None
        for name in shards.values() if isinstance(shards, dict) else [None]:
            if not isinstance(name, str) or not is_plain(name):
                raise ValueError(f"{path.name} names the file {name!r}, which is not beside it")


def read_state(path: Path | str, flag: str) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or `torch.save` file, on the CPU; no pickled code is run.

    A checkpoint that keeps it under `state_dict` or `model` is opened. UserError naming `flag` for anything else.
    """
    what = f"weights file (--{flag})"
    if str(path).endswith(".safetensors"):
        return load_vectors(path, what, "fetch or make it again")
    state: Any = load_tensors(path, what)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise UserError(f"{what} {path} holds no state dict (names and tensors)")
    return state


def load_state(net: nn.Module, state: dict[str, Tensor], where: str, drop: Sequence[str] = ()) -> None:
    """Load `state` into `net`; every name and shape must fit, and UserError names the first that does not.

    drop   prefixes of names that the network may lack, such as a classifier it was built without
    """
    own = net.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.startswith(tuple(drop))}
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{where} lacks '{name}' {tuple(value.shape)}; it is of another network")
        if state[name].shape != value.shape:
            raise UserError(f"{where} has '{name}' of shape {tuple(state[name].shape)}, not {tuple(value.shape)}")
    for name in state:
        if name not in own:
            raise UserError(f"{where} has '{name}', which the network lacks; it is of another network")
    net.load_state_dict(state)
