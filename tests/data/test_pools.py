"""Which file plays which part, and whether features are of the pools they are given with."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import yaml
from PIL import Image

from data.feature_files import FeatureWriter
from data.payloads import image_payload, vector_payload
from data.pools import (
    ROLES,
    PoolsConfig,
    Roles,
    check_aligned,
    check_one_teacher,
    lasting,
    open_features,
    open_images,
    open_texts,
    read_manifest,
    refuse_bad,
    roles,
)
from data.tsv import TsvWriter
from methods.clip_inputs import write_manifest
from utils.config import idle_options, parse
from utils.errors import UserError

CFG = PoolsConfig()
PIPES = [
    *((open_images, ending) for ending in (".npy", ".tar", ".tsv")),
    *((open_texts, ending) for ending in (".json", ".jsonl", ".tar", ".tsv", ".txt")),
    *((open_features, ending) for ending in (".npy", ".tsv")),
]


def refused(work, *arguments, **options):
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config(*flags):
    return parse(PoolsConfig, "distill", [str(flag) for flag in flags])[0]


# Roles


def test_the_published_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lists = {
        "image": "GCC-3M/tsv/image_00.tsv",
        "image_feat": "GCC-3M/vit_l_14_post_proj/image_00.feat.tsv",
        "text": "GCC-3M/tsv/text_00.tsv",
        "text_feat": "GCC-3M/vit_l_14_post_proj/text_00.feat.tsv",
    }
    for name, line in lists.items():
        (tmp_path / f"{name}.list").write_text(line)  # without a final newline, as published
    cfg = config("--dataroot", "/data", "--tsv_file_list", *(f"{name}.list" for name in lists), "--num_workers", 3)
    assert roles(cfg) == Roles(*((f"/data/{line}",) for line in lists.values()))
    assert cfg.threads == 3


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("x/image_00.tsv", "images"),
        ("images-00.tsv", "images"),
        ("IMG.tsv", "images"),
        ("cc3m_caption_07.tsv", "texts"),
        ("text.feat.tsv", "text_feats"),
        ("captions_features.tsv", "text_feats"),
        ("feather_image_0.tsv", "images"),  # the published code takes it for features
        ("image/text_00.tsv", "texts"),  # the folder's name says nothing
    ],
)
def test_a_part_is_told_by_words_of_a_name(name, role):
    found = roles(config("--tsv_file_list", name))
    assert getattr(found, role) == (name,)
    assert sum(len(getattr(found, other)) for other in ("images", "image_feats", "texts", "text_feats")) == 1


@pytest.mark.parametrize(
    "name",
    [
        "imagenet21k_00.tsv",
        "roberta_00.tsv",
        "coco_image_text_00.tsv",
        "cc12m_img_caption.tsv",
        "00.feat.tsv",
        "image_00.tar",
        "image_00",
    ],
)
def test_a_name_that_does_not_tell(tmp_path, name):
    said = f"what '{name}' holds cannot be told from its name"
    text = refused(config, "--tsv_file_list", "image_01.tsv", name)
    assert said in text and "--images, --image_feats, --texts and --text_feats" in text
    (tmp_path / "all.list").write_text(f"image_01.tsv\n{name}\n")
    assert f"{tmp_path / 'all.list'}: {said}" in refused(roles, config("--tsv_file_list", tmp_path / "all.list"))


def test_explicit_parts_keep_their_order(tmp_path):
    (tmp_path / "texts.list").write_text("b.tsv\n\n  a.tsv \n")
    cfg = config("--images", "z.tsv", "photos", "--texts", tmp_path / "texts.list", "c.txt", "--image_feats", "f.npy")
    assert roles(cfg) == Roles(("z.tsv", "photos"), ("f.npy",), ("b.tsv", "a.tsv", "c.txt"))
    below = roles(config("--images", "z.tsv", "/photos", "toy", "--dataroot", "/data"))
    assert below.images == ("/data/z.tsv", "/photos", "toy")


def test_a_manifest_lists_shards_beside_it(tmp_path):
    path = tmp_path / "pools.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "teacher": {"source": "tiny", "dim": 32},
                "images": ["b.tsv", "/abs/a.tar", "toy"],
                "image_feats": ["b.npy", "a.npy"],
                "texts": "t.txt",
                "text_feats": None,
            }
        )
    )
    found = roles(config("--pool_manifest", path))
    assert found.images == (str(tmp_path / "b.tsv"), "/abs/a.tar", "toy")
    assert found.image_feats == (str(tmp_path / "b.npy"), str(tmp_path / "a.npy"))
    assert (found.texts, found.text_feats) == ((str(tmp_path / "t.txt"),), ())
    (tmp_path / "a.npy").touch()
    below = roles(config("--pool_manifest", path, "--dataroot", "/data"))
    assert (below.texts, below.image_feats) == (("/data/t.txt",), ("/data/b.npy", str(tmp_path / "a.npy")))
    assert read_manifest(path)["texts"] == [str(tmp_path / "t.txt")]
    path.write_text("texts: [all.list]")
    (tmp_path / "all.list").write_text("b.txt\na.txt")
    assert roles(config("--pool_manifest", path)).texts == (str(tmp_path / "b.txt"), str(tmp_path / "a.txt"))


def test_a_manifest_that_was_written_whole_is_read_whole(tmp_path):
    """Cut anywhere behind its digest it would be one of fewer files, or of none."""
    path, files = tmp_path / "pools.yaml", {"images": ["/a", "/b"], "texts": ["/c"]}
    write_manifest(path, files, {"source": "tiny", "dim": 8})
    content = path.read_text()
    assert read_manifest(path) == {role: files.get(role, []) for role in ROLES}
    for end in range(content.index("images"), len(content) - 1):
        path.write_text(content[:end])
        assert "it so" in refused(read_manifest, path) or "is not valid YAML" in refused(read_manifest, path)
    lines = [line for line in content.splitlines() if not line.startswith("digest") and "/b" not in line]
    path.write_text("\n".join(lines))  # as the error says
    assert read_manifest(path)["images"] == ["/a"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("image: [a]", "unknown key 'image' (did you mean 'images'?); it lists images, image_feats, texts, text_feats"),
        ("images: [{a: b}]", "images is [{'a': 'b'}]; it must be a list of files"),
        ('images: ["/a\\0.tar"]', "has the name '/a\\x00.tar', which no file can have"),
        ('texts: ["/a\\0.list"]', "which no file can have"),
        ('images: ["/a\\uD83E.tar"]', "which no file can have"),
        ("images: 3", "images is 3; it must be a list of files"),
        ("- images", "holds no keys and values"),
        ("images: [", "is not valid YAML"),
    ],
)
def test_manifests_that_are_none(tmp_path, content, said):
    path = tmp_path / "pools.yaml"
    path.write_text(content)
    assert said in refused(roles, config("--pool_manifest", path))


def test_lists_and_manifests_that_are_missing(tmp_path):
    assert "no list of files at" in refused(roles, config("--images", tmp_path / "x.list"))
    assert "no manifest of pools at" in refused(roles, config("--pool_manifest", tmp_path / "x.yaml"))
    assert "is a folder; name the .yaml file in it" in refused(roles, config("--pool_manifest", tmp_path))
    (tmp_path / "x.list").write_text("\n")
    assert "names no file" in refused(roles, config("--images", tmp_path / "x.list"))
    (tmp_path / "x.list").write_bytes(b"\xff\xfe")
    assert "is no text" in refused(roles, config("--images", tmp_path / "x.list"))


@pytest.mark.parametrize(
    ("flags", "ways"),
    [
        (("--images", "a", "--tsv_file_list", "text.tsv"), "--images and --tsv_file_list"),
        (("--texts", "a", "--pool_manifest", "x.yaml"), "--texts and --pool_manifest"),
        (("--tsv_file_list", "text.tsv", "--pool_manifest", "x.yaml"), "--tsv_file_list and --pool_manifest"),
    ],
)
def test_parts_are_given_one_way(flags, ways):
    assert f"{ways} each say which files are which; give one of them" in refused(config, *flags)


def test_a_missing_part_is_named():
    found = roles(config("--images", "a", "--texts", "b"))
    found.need("images", "texts")
    text = refused(found.need, "images", "image_feats", remedy="; or run buffer.py first")
    assert text == (
        "there are no features of the images; give --image_feats, or add them to --tsv_file_list or --pool_manifest; "
        "or run buffer.py first"
    )


def test_what_does_nothing_is_told():
    assert idle_options(config("--images", "toy", "--toy_images", 20)) == []
    assert idle_options(config("--texts", "a", "--toy_texts", 20)) == [
        "--toy_texts 20 does nothing without --texts toy"
    ]
    assert "share of the images" in refused(config, "--bad_images", 2)


# Alignment


@pytest.fixture
def shards(tmp_path):
    """shards("image", 4, 6) are TSV files of texts and of features with so many rows, keys counting on."""

    def make(name, *counts, width=5, first=0):
        data, feats, row = [], [], first
        for number, count in enumerate(counts):
            data.append(str(tmp_path / f"{name}_{number}.tsv"))
            feats.append(str(tmp_path / f"{name}_{number}.feat.tsv"))
            with TsvWriter(data[-1]) as texts, TsvWriter(feats[-1]) as features:
                for _ in range(count):
                    texts.add(f"k{row}", json.dumps({"captions": [f"text {row}"]}))
                    features.add(f"k{row}", vector_payload(np.full(width, row)))
                    row += 1
        return data, feats

    return make


def aligned(data, feats, what=""):
    check_aligned(open_texts(data, CFG), open_features(feats, CFG), what)


def test_features_of_the_same_rows(shards):
    data, feats = shards("a", 4, 6)
    aligned(data, feats)
    aligned(data[::-1], feats[::-1])
    check_aligned(None, open_features(feats, CFG), "texts")
    assert open_features(feats, CFG).rows([5]).tolist() == [[5.0] * 5]


def test_twelve_photographs_with_captions_of_all_sorts(tmp_path):
    captions = ["a cat", "café « naïf »", "", "x" * 5000, "猫", *(f"text {row}" for row in range(7))]
    vectors = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)
    names = [str(tmp_path / name) for name in ("image_00.tsv", "image_00.feat.tsv", "text_00.tsv", "text_00.feat.tsv")]
    with contextlib.ExitStack() as stack:
        images, image_feats, texts, text_feats = (stack.enter_context(TsvWriter(name)) for name in names)
        for row, (caption, vector) in enumerate(zip(captions, vectors, strict=True)):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), (row * 20, 100, 0)).save(buffer, "JPEG")
            images.add(f"i{row}", image_payload(buffer.getvalue()))
            texts.add(f"t{row}", json.dumps({"captions": [caption]}, ensure_ascii=row % 2 == 0))
            image_feats.add(f"i{row}", vector_payload(vector))
            text_feats.add(f"t{row}", vector_payload(-vector))
    found = roles(config("--tsv_file_list", *names))
    pool, sentences = open_images(found.images, CFG), open_texts(found.texts, CFG)
    of_images, of_texts = open_features(found.image_feats, CFG), open_features(found.text_feats, CFG)
    check_aligned(pool, of_images), check_aligned(sentences, of_texts), check_one_teacher(of_images, of_texts)
    assert [sentences.text(row) for row in range(12)] == captions
    assert all(abs(pool.image(row).getpixel((5, 5))[0] - row * 20) < 4 for row in range(12))
    assert np.array_equal(of_images.rows(range(12)).numpy(), vectors)
    assert np.array_equal(of_texts.rows(range(12)).numpy(), -vectors)
    assert "row 0 is 't0' in texts" in refused(check_aligned, sentences, of_images)


def test_one_file_of_features_for_several_of_the_pool(shards, tmp_path):
    data, _ = shards("a", 4, 6)
    np.save(tmp_path / "all.npy", np.zeros((10, 5), dtype=np.float32))
    aligned(data, [tmp_path / "all.npy"])


def test_unequal_counts(shards, tmp_path):
    data, feats = shards("a", 4, 6)
    assert "texts are in 2 files, their features in 3; features are matched by row" in refused(
        aligned, data, [*feats, feats[0]]
    )
    assert f"{data[0]} has 4 texts, its features {feats[1]} 6" in refused(aligned, data, feats[::-1])
    np.save(tmp_path / "all.npy", np.zeros((9, 5), dtype=np.float32))
    assert "and 1 more has 10 sentences, the features" in refused(aligned, data, [tmp_path / "all.npy"], "sentences")


def test_keys_are_compared_row_by_row(shards):
    data, _ = shards("a", 10)
    _, feats = shards("b", 10, first=1)
    text = refused(aligned, data, feats)
    assert f"row 0 is 'k0' in texts {data[0]}, and 'k1' in features {feats[0]}; features are matched by row" in text


def test_of_many_keys_some_are_compared(shards, monkeypatch):
    monkeypatch.setattr("data.chain.sampled.__defaults__", (50, 10))
    data, feats = shards("a", 200)
    aligned(data, feats)
    _, others = shards("b", 200, first=1)
    assert "row 0 is 'k0'" in refused(aligned, data, others)


def test_the_order_of_shards_shows_in_the_keys(shards):
    data, feats = shards("a", 5, 5)
    assert "row 0 is 'k0'" in refused(aligned, data, feats[::-1])


def test_features_know_the_pool_they_were_extracted_of(tmp_path):
    pool = open_images(["toy"], PoolsConfig(toy_images=20, toy_size=16))
    note = {"model": "tiny", "pool": pool.fingerprint(), "keys": pool.keys_digest()}
    writer = FeatureWriter(tmp_path, "image_feats", 20, 5, note)
    writer.add(np.zeros((20, 5)))
    features = open_features([writer.finish()], CFG)
    check_aligned(pool, features)
    other = open_images(["toy"], PoolsConfig(toy_images=20, toy_size=32))
    assert "were extracted of other images than toy" in refused(check_aligned, other, features)
    longer = open_images(["toy"], PoolsConfig(toy_images=21, toy_size=16))
    assert "toy has 21 images, the features" in refused(check_aligned, longer, features)


def test_notes_tell_the_order_of_shards(tmp_path):
    """Arrays have no keys, and files that were extracted one by one may be of equal length."""
    shards = [open_images([name], CFG) for name in ("toy:10:16", "toy:10:32")]
    files = []
    for number, pool in enumerate(shards):
        note = {"model": "tiny", "pool": pool.fingerprint(), "keys": pool.keys_digest()}
        writer = FeatureWriter(tmp_path, f"image_feats_{number}", 10, 5, note)
        writer.add(np.zeros((10, 5)))
        files.append(writer.finish())
    both = open_images(["toy:10:16", "toy:10:32"], CFG)
    check_aligned(both, open_features(files, CFG))
    text = refused(check_aligned, both, open_features(files[::-1], CFG))
    assert text.startswith(f"features {files[1]} were extracted of other images than toy; features are matched by row")


def test_both_features_are_of_one_teacher(tmp_path):
    def made(name, dim, model):
        writer = FeatureWriter(tmp_path, name, 2, dim, {"model": model})
        writer.add(np.zeros((2, dim)))
        return open_features([writer.finish()], CFG)

    images, texts, narrow = made("a", 6, "one"), made("b", 6, "other"), made("c", 5, "one")
    check_one_teacher(images, made("d", 6, "one"))
    assert "a.npy is given as features of images and of texts" in refused(check_one_teacher, images, images)
    mixed = open_features([shard.path for part in (images, texts) for shard in part.shards], CFG)
    assert "are of one and of other; extract all by one teacher" in refused(check_one_teacher, mixed, images)
    assert "have 6 and 5 numbers; extract both by one teacher" in refused(check_one_teacher, images, narrow)
    assert "are of one and of other; extract all by one teacher" in refused(check_one_teacher, images, texts)
    assert "there are no features of the texts" in refused(open_features, [], CFG, "features of the texts")


def test_bad_images_beyond_a_share():
    refuse_bad(1, 100, 0.01, "a.png (it is empty)")
    text = refused(refuse_bad, 2, 100, 0.01, "a.png (it is empty)")
    assert text.startswith("2 of 100 images cannot be decoded, such as a.png (it is empty); mend or remove them")


def test_a_manifest_keeps_the_numbers_of_drawn_pools(tmp_path):
    asked = PoolsConfig(toy_images=24, toy_size=16, toy_texts=11)
    (tmp_path / "pools.yaml").write_text(
        f"images: [{lasting('images', 'toy', asked)}]\ntexts: [{lasting('texts', 'toy', asked)}]\n"
    )
    plain = PoolsConfig(pool_manifest=str(tmp_path / "pools.yaml"))
    found = roles(plain)
    assert (found.images, found.texts) == (("toy:24:16",), ("toy:11",))
    images, texts = open_images(found.images, plain), open_texts(found.texts, plain)
    assert (len(images), images.image(0).size, len(texts)) == (24, (16, 16), 11)
    assert images.fingerprint() == open_images(["toy"], asked).fingerprint()
    assert lasting("images", "toy:24:16", plain) == "toy:24:16"  # whatever this command's own numbers are
    with pytest.raises(UserError, match="toy:many"):
        open_images(["toy:many"], plain)


@pytest.mark.parametrize("opened, ending", PIPES)
def test_a_pipe_is_not_waited_for(tmp_path, opened, ending):
    os.mkfifo(tmp_path / f"x{ending}")
    line = refused(opened, [str(tmp_path / f"x{ending}")], CFG)
    assert f"x{ending} are no file but a pipe or a device; write them to a file" in line
