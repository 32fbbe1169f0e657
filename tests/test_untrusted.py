"""No file that is read can run code: a malicious pickle, in every place that takes a file, touches nothing. Nor does
what a header claims take memory that the file does not fill."""

import ast
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.feature_files import Features
from data.image_pools import open_image_shard
from data.images import ImagesConfig
from data.npz import read_arrays
from data.sources import fetched_source
from data.tar_files import TarFile
from data.zca import ZCA
from methods.core.checkpoints import Checkpoints
from methods.core.expert_files import _load
from methods.core.published import PublishedTrajectories
from methods.core.results import noted_config
from methods.image_files import load_images
from methods.pair_files import read_phases
from methods.poster_files import load_poster
from networks.clip_students import load_student
from networks.text_cache import read_published_embeddings
from networks.weights import load_transformer, read_state
from tests.conftest import ROOT
from utils.errors import UserError

PACKAGES = ("buffer.py", "distill.py", "eval.py", "data", "methods", "networks", "utils")


class Malice:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


FORMS = {
    "zip": lambda malice, path: torch.save({"meta": malice, "images": torch.ones(2)}, path),
    "legacy": lambda malice, path: torch.save(malice, path, _use_new_zipfile_serialization=False),
    "pickle": lambda malice, path: path.write_bytes(pickle.dumps([malice])),
}
TENSOR_FILES = {
    "distilled_best.pt": lambda path: load_images([path]),
    "images_best.pt": lambda path: load_images([path]),
    "pairs.pt": read_phases,
    "distilled.pt": load_poster,
    "best_poster.pt": load_poster,
    "replay_buffer_0.pt": lambda path: PublishedTrajectories(path.parent, ("net",)),
    "progress.pt": _load,
    "progress_mapped.pt": lambda path: _load(path, mmap=True),
    "state_1.pt": lambda path: Checkpoints(path.parent, "state", 1, 0).restore(object()),
    "noted.pt": noted_config,
    "student.pt": load_student,
    "image_weights.pt": lambda path: read_state(path, "image_weights"),
    "text_weights.bin": lambda path: read_state(path, "text_weights"),
    "weights.safetensors": lambda path: read_state(path, "image_weights"),
    "zca.safetensors": ZCA.load,
    "arrays.npz": lambda path: read_arrays(path, ["train_images"]),
    "flickr_bert_text_embed.npz": lambda path: read_published_embeddings(path, 3),
    "features.npy": lambda path: Features([path]),
    "pool.npy": lambda path: open_image_shard(path),
    "pool.tar": lambda path: TarFile(path, {"png"}, "images"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_malicious_pickle_in_place_of_a_file(tmp_path, name, form):
    target, path = tmp_path / "owned", tmp_path / name
    FORMS[form](Malice(target), path)
    with pytest.raises(UserError) as caught:
        TENSOR_FILES[name](path)
    assert "\n" not in str(caught.value) and tmp_path.name in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_traps_do_work(tmp_path, form):
    FORMS[form](Malice(tmp_path / "owned"), tmp_path / "x.pt")
    if form == "pickle":
        pickle.loads((tmp_path / "x.pt").read_bytes())
    else:
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("arrays.npz", lambda path: read_arrays(path, ["train_images"])),
        ("embed.npz", lambda path: read_published_embeddings(path, 1)),
        ("features.npy", lambda path: Features([path])),
        ("pool.npy", lambda path: open_image_shard(path)),
    ],
)
def test_arrays_of_objects(tmp_path, name, read):
    objects = np.array([Malice(tmp_path / "owned")], dtype=object)
    if name.endswith("npz"):
        np.savez(tmp_path / name, train_images=objects, bert_test_embed=objects)
    else:
        np.save(tmp_path / name, objects, allow_pickle=True)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and not (tmp_path / "owned").exists()


def _header(shape, descr) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _array(path, shape, descr) -> None:
    content = _header(shape, descr) + bytes(64)
    if path.suffix != ".npz":
        path.write_bytes(content)
        return
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train_images", "bert_test_embed"):
            archive.writestr(f"{name}.npy", content)


ARRAYS = {
    "features.npy": lambda path: Features([path]),
    "pool.npy": open_image_shard,
    "arrays.npz": lambda path: read_arrays(path, ["train_images"]),
    "embed.npz": lambda path: read_published_embeddings(path, 1),
}
ABSURD = [(1 << 40, 8), (1 << 60, 8), (1 << 63, 1 << 63), (0, 1 << 62), (1 << 62, 0), (-1, 8), (1 << 20,) * 3, (17, 1)]


@pytest.fixture
def little_memory():
    """What a test takes at once and by how much it grows: a gigabyte at most."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("shape", ABSURD, ids=str)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_absurd_shapes(tmp_path, name, shape, little_memory):
    shape = (*shape, 4, 3)[-4:] if name == "pool.npy" else shape
    _array(tmp_path / name, shape, "|u1" if name == "pool.npy" else "<f4")
    with pytest.raises(UserError, match=r"it claims to be \(.*\) of \w+ but has only 64 bytes") as caught:
        ARRAYS[name](tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("descr", ["|V1000000000", "|S1000000000", "<U100000000"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_absurd_items(tmp_path, name, descr, little_memory):
    _array(tmp_path / name, (4, 8), descr)
    with pytest.raises(UserError, match="has only 64 bytes"):
        ARRAYS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["features.npy", "pool.npy"])
def test_a_header_of_absurd_length(tmp_path, name, little_memory):
    (tmp_path / name).write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + b"{}")
    with pytest.raises(UserError, match="its header claims 4,294,967,280 bytes"):
        ARRAYS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["arrays.npz", "embed.npz"])
def test_an_archive_that_unpacks_to_much_more(tmp_path, name, monkeypatch, little_memory):
    monkeypatch.setattr("utils.arrays._ROOM", 1 << 20)
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in ("train_images", "bert_test_embed"):
            archive.writestr(f"{entry}.npy", _header((1, 1 << 20), "<f4") + bytes(4 << 20))
    with pytest.raises(UserError, match=r"claims 4,194,432 bytes but is packed in \d,\d+"):
        ARRAYS[name](tmp_path / name)


@pytest.mark.parametrize("read", [lambda path: read_state(path, "text_weights"), ZCA.load])
def test_safetensors_of_absurd_shapes(tmp_path, read, little_memory):
    headers = [
        {"x": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, end]}}
        for shape in ABSURD
        for end in (64, 4 * shape[0] * shape[1])
    ]
    for content in (*(json.dumps(header).encode() for header in headers), b""):
        length = len(content) or 1 << 62
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + content + bytes(64))
        with pytest.raises(UserError, match=r"x\.safetensors cannot be read") as caught:
            read(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_pickled_batches_of_cifar(tmp_path, name, folder):
    """torchvision unpickles them, but none whose MD5 is not that of the published file."""
    (tmp_path / folder).mkdir()
    files = ["batches.meta", "test_batch", *(f"data_batch_{n}" for n in range(1, 6)), "train", "test", "meta"]
    for file in files:
        (tmp_path / folder / file).write_bytes(pickle.dumps(Malice(tmp_path / "owned")))
    with pytest.raises(UserError, match="no whole CIFAR"):
        fetched_source(ImagesConfig(dataset=name, data_path=str(tmp_path)))
    assert not (tmp_path / "owned").exists()


def test_a_folder_of_a_model_with_pickled_weights(tmp_path):
    from transformers import BertConfig, BertModel

    shape = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    shape.save_pretrained(tmp_path)
    torch.save({"embeddings": Malice(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises((UserError, ValueError, OSError, pickle.UnpicklingError, RuntimeError)):
        load_transformer(BertModel, str(tmp_path), local=True)
    assert not (tmp_path / "owned").exists()


def test_an_autoencoder_with_pickled_weights(tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=1).save_config(tmp_path)
    torch.save({"encoder": Malice(tmp_path / "owned")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(Exception):  # noqa: B017  # whatever the library says; networks/diffusion.py puts it in a line
        AutoencoderKL.from_pretrained(tmp_path, local_files_only=True)
    assert not (tmp_path / "owned").exists()


def calls(path: Path):
    """Every call in a file: its dotted name, its keywords and its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node.lineno


def unsafe(name: str, words: dict[str | None, str]) -> bool:
    """Whether such a call could run what is in a file, or write where an archive says."""
    last, root = name.rpartition(".")[2], name.partition(".")[0]
    wanted = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    if name in wanted:
        key, value = wanted[name]
        return words.get(key) != value
    if last == "get_state_dict":
        return words.get("weights_only") != "True"
    if last in ("extractall", "extract", "unpack_archive", "load_state_dict_from_url"):
        return True
    if words.get("trust_remote_code", "False") != "False" or words.get("shell", "False") != "False":
        return True
    if root in ("pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"):
        return True
    if root == "yaml":
        return last not in ("safe_dump", "SafeLoader")
    return name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "Image.open")


def test_no_call_that_could_run_a_file():
    """`Image.open` is for utils/pictures.py alone, which knows the formats and the most pixels."""
    files = [
        file for name in PACKAGES for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    assert len(files) > 150
    found = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in files
        for name, words, line in calls(file)
        if unsafe(name, words) and not (name == "Image.open" and file.name == "pictures.py")
    ]
    assert not found, found
