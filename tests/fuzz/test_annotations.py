"""Captions and classes that users bring: annotation files, metadata.jsonl, lists of classes, templates, subsets."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from hypothesis import strategies as st
from PIL import Image

from data.captions import image_files, read_annotations
from data.catalogue import Catalogue, Kind, read_label_file
from data.metadata import read_metadata, write_metadata
from data.pools import read_manifest
from data.subsets import read_subsets
from methods.clip_inputs import noted_teacher
from networks.clip_students import read_student_yaml
from networks.prompts import class_names, templates
from tests.fuzz.cases import changed, damaged, fuzz, json_files, outcome, texts, trees

TRAIN = [
    {"image": "a/1.jpg", "caption": "A cat.", "image_id": "x1"},
    {"image": "a/1.jpg", "caption": "Ein Kätzchen", "image_id": "x1"},
    {"image": "b/2.jpg", "caption": "A dog", "image_id": 7},
]
TEST = [{"image": "a/1.jpg", "caption": ["A cat", "a cat?"]}, {"image": "b/2.jpg", "caption": ["A dog"]}]
FILES = ("cat/1.png", "cat/2.png", "dog/1.png")
STUDENT = {
    "MODEL": {"TYPE": "CLIP", "NAME": "ViT-B/32", "EMBED_DIM": 512, "VISION_SIZE": 224, "VISION_LAYERS": 12},
}


@fuzz(500, 12, content=json_files(TRAIN), split=st.just("train"))
def test_train_annotations(scratch, content, split) -> None:
    """Any file of training annotations is read whole, or refused in one line."""
    annotations(scratch, content, split)


@fuzz(400, 8, content=json_files(TEST), split=st.just("test"))
def test_test_annotations(scratch, content, split) -> None:
    """Any file of test annotations is read whole, or refused in one line."""
    annotations(scratch, content, split)


def annotations(scratch: Path, content: bytes, split: str) -> None:
    path = scratch / f"x_{split}.json"
    path.write_bytes(content)
    seen = []

    def main() -> None:
        notes = read_annotations(path, split)
        files = image_files(str(scratch), notes.paths, None)
        assert all(scratch in file.parents for file in files)  # nothing outside the folder of images
        [file.is_file() for file in files]
        seen.append(notes)

    if outcome(main)[0] == 0:
        rows = json.loads(content)
        count = len(rows) if split == "train" else sum(len(row["caption"]) for row in rows)
        assert len(seen[0].captions) == len(seen[0].image_of) == count


def catalogue(root: Path) -> Catalogue:
    for name in FILES:
        path = root / "train" / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(path)
    kinds, files = (Kind("cat", "cat"), Kind("dog", "dog")), (FILES[:2], FILES[2:])
    train = root / "train"
    return Catalogue("folder", "folder", kinds, train, train, files, (), "", str(root), 1)


line = st.fixed_dictionaries(
    {}, optional={"file_name": st.sampled_from([*FILES, "2.png", "train/cat/1.png", "../1.png"]) | texts, "text": texts}
)
lines = st.lists(line, max_size=5).map(lambda rows: [json.dumps(row).encode() for row in rows])
captioned = [json.dumps({"file_name": name, "text": "a thing"}).encode() for name in FILES]


@fuzz(
    600,
    12,
    content=st.one_of(lines.map(b"\n".join), damaged(b"\n".join(captioned)), json_files(TRAIN)),
    part=st.booleans(),
)
def test_metadata(scratch, content, part) -> None:
    """Any metadata.jsonl is read, or refused in one line; what is read, every image of it, was asked for."""
    path = scratch / "metadata.jsonl"
    path.write_bytes(content)
    seen: list[dict[str, str]] = []
    rc, _ = outcome(lambda: seen.append(read_metadata(path, catalogue(scratch), part)))
    if rc == 0:
        assert set(seen[0]) <= set(FILES) and (part or len(seen[0]) == len(FILES))


@fuzz(300, 8, captions=st.fixed_dictionaries({name: texts for name in FILES}))
def test_metadata_comes_back(scratch, captions) -> None:
    """Captions that were written are read as they were, white space around them aside, or refused as empty."""
    seen: list[dict[str, str]] = []

    def main() -> None:
        write_metadata(scratch / "metadata.jsonl", captions)
        seen.append(read_metadata(scratch / "metadata.jsonl", catalogue(scratch)))

    rc, told = outcome(main)
    if rc == 0:
        assert seen[0] == {name: text.strip() for name, text in captions.items()}
    else:
        assert "empty captions" in told


plain_lines = st.lists(
    st.one_of(texts, st.tuples(texts, texts).map("\t".join), st.just("a photo of a {}.")), max_size=5
)
text_files = st.one_of(
    plain_lines.map(lambda rows: "\n".join(rows).encode()),
    damaged(b"n01\ttench\nn02\tchurch, a\n"),
    st.binary(max_size=9),
)


@fuzz(600, 12, content=text_files, read=st.sampled_from([read_label_file, class_names, templates]))
def test_lists_of_lines(scratch, content, read) -> None:
    """Any list of classes, names or templates is read, or refused in one line."""
    (scratch / "list.txt").write_bytes(content)
    outcome(lambda: read(str(scratch / "list.txt")))


def yaml_files(tree: object) -> st.SearchStrategy:
    """The bytes of YAML files: of this tree somewhat changed, of anything, and damaged ones."""
    written = st.one_of(changed(tree), changed(tree).flatmap(changed), trees)
    odd = [
        b"a: 2026-13-45",
        b"a: &a [*a]",
        b"[" * 3000,
        b"1" * 5000,
        b"a: 1\na: 2",
        b"!!python/name:os.system ''",
        b"<<: x",
    ]
    return st.one_of(
        written.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode()),
        damaged(yaml.safe_dump(tree).encode()),
        st.sampled_from(odd),
    )


@fuzz(500, 10, content=yaml_files({"mine": [0, 217, 482], "other": [5]}))
def test_subsets(scratch, content) -> None:
    """Any file of subsets is read, or refused in one line; what is read are different classes of ImageNet."""
    (scratch / "subsets.yaml").write_bytes(content)
    seen: list[dict[str, tuple[int, ...]]] = []
    if outcome(lambda: seen.append(read_subsets(str(scratch / "subsets.yaml"))))[0] == 0:
        assert all(ids and len(set(ids)) == len(ids) and set(ids) <= set(range(1000)) for ids in seen[0].values())


POOLS = {
    "images": ["i.tsv"],
    "texts": ["t.txt"],
    "image_feats": [],
    "teacher": {"source": "x", "weights": "", "dim": 4},
}


@fuzz(400, 8, content=yaml_files(POOLS))
def test_manifests_of_pools(scratch, content) -> None:
    """Any manifest of pools is read, or refused in one line."""
    path = scratch / "pools.yaml"
    path.write_bytes(content)
    outcome(lambda: (read_manifest(path), noted_teacher(path)))


@fuzz(400, 8, content=yaml_files(STUDENT))
def test_student_configs(scratch, content) -> None:
    """Any YAML file of a student is read, or refused in one line."""
    (scratch / "student.yaml").write_bytes(content)
    outcome(lambda: read_student_yaml(scratch / "student.yaml"))
