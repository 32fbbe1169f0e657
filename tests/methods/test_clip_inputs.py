"""buffer.py of DIME-FM from end to end: teacher, features, selection, and the manifest that distill.py reads."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import methods.clip_features as clip_features
from data.pools import Features, PoolsConfig, check_aligned, check_one_teacher, open_images, open_texts, roles
from methods.clip_features import FeatureConfig
from methods.clip_inputs import Buffer, BufferStages, buffer, noted_teacher
from methods.clip_selection import SelectConfig
from methods.clip_teacher import TeacherConfig
from methods.dimefm import Distill, distill, open_inputs
from networks.clip import load_clip
from tests.conftest import contents
from utils.config import idle_options, parse
from utils.errors import UserError
from utils.run import RunConfig

TOY = PoolsConfig(images=("toy",), texts=("toy",), toy_images=20, toy_texts=30, workers=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def command(cache, tmp_path):
    """command(stages, pools, resume, select, ...) runs the verb; the manifest."""

    def run(*stages, pools=TOY, resume=False, budget=0, name="run", teacher="tiny", select=None, **features):
        learns = TeacherConfig(teacher=teacher, teacher_images=32, teacher_epochs=1, teacher_batch=16)
        cfg = Buffer(
            pools=replace(pools, cache_dir=cache),
            run=RunConfig(device="cpu", resume=resume),
            steps=BufferStages(stages=stages, buffer_path=str(tmp_path / name)),
            teacher=learns,
            features=FeatureConfig(feature_batch=8, **features),
            select=replace(select or SelectConfig(), budget=budget),
        )
        cfg.check()
        buffer(cfg)
        return tmp_path / name / "pools.yaml"

    return run


def opened(manifest: Path, **pools):
    """What a manifest lists: images, sentences and the features of both, found to belong together."""
    cfg = PoolsConfig(pool_manifest=str(manifest), toy_images=20, toy_texts=30, **pools)
    found = roles(cfg)
    images, texts = open_images(found.images, cfg), open_texts(found.texts, cfg)
    seen, said = Features(found.image_feats), Features(found.text_feats)
    check_aligned(images, seen)
    check_aligned(texts, said)
    check_one_teacher(seen, said)
    return images, texts, seen, said


def test_all_stages_and_what_they_leave(command, capsys):
    manifest = command("teacher", "features", "select", budget=7)
    images, texts, seen, said = opened(manifest)
    assert len(images) == len(seen) == 20 and len(texts) == len(said) == 7
    teacher = noted_teacher(manifest)
    clip = load_clip(teacher["source"], "nowhere")
    assert teacher["weights"] == clip.fingerprint == seen.note["weights"] and teacher["dim"] == said.dim == clip.dim
    torch.testing.assert_close(
        said.rows(range(7)), clip.texts([texts.text(row) for row in range(7)]), rtol=1e-4, atol=1e-5
    )
    every = open_texts(["toy"], TOY)
    with open(manifest.parent / "selection.csv", encoding="utf-8", newline="") as file:
        audit = list(csv.DictReader(file))
    for row, line in enumerate(audit):
        assert line["text"] == texts.text(row) == every.text(int(line["id"]))
        score = torch.cosine_similarity(seen.rows([int(line["owner"])]), said.rows([row]))
        assert float(line["score"]) == pytest.approx(float(score), abs=1e-5)
    assert "the teacher knows" in capsys.readouterr().out
    before = contents(manifest.parent)
    command("teacher", "features", "select", budget=7, resume=True)
    assert contents(manifest.parent) == before  # nothing is done twice


def test_a_manifest_that_is_not_as_it_was_written(command):
    """No cut is taken for a whole one, wherever it is, nor a changed name; without the digest it is the user's own."""
    manifest = command("teacher", "features")
    pools, whole = PoolsConfig(pool_manifest=str(manifest)), manifest.read_bytes()
    assert roles(pools).image_feats and whole.startswith(b"format: 1\ndigest: ")
    for end in range(len(whole) - 1):
        manifest.write_bytes(whole[:end])
        if whole[:end].strip() == b"format: 1":
            assert not any(vars(roles(pools)).values())  # there are no images, as is told later
            continue
        with pytest.raises(UserError, match=f"manifest {manifest}"):
            roles(pools)
    changed = whole.decode().replace("source: teacher", "source: teacheq")
    manifest.write_text(changed)
    with pytest.raises(UserError, match=r"is not as buffer\.py wrote it; restore it, or drop the line of its digest"):
        roles(pools)
    manifest.write_text("".join(line for line in changed.splitlines(True) if not line.startswith("digest")))
    assert roles(pools).image_feats


def test_stages_one_by_one_are_the_stages_at_once(command, tmp_path):
    whole = command("teacher", "features", "select", budget=5, name="whole")
    for stage in ("teacher", "features", "select"):
        parts = command(stage, budget=5, name="parts", resume=stage != "teacher")
    one, two = contents(whole.parent), contents(parts.parent)
    assert one.keys() == two.keys()
    assert [n for n in one if one[n] != two[n] and n != "config.yaml" and not n.endswith(".pt")] == []


def test_sentences_that_changed_after_their_features(command, tmp_path):
    lines, file = [f"a {word} star" for word in ("red", "blue", "green", "grey", "black")], tmp_path / "texts.txt"
    file.write_text("\n".join(lines))
    pools = replace(TOY, texts=(str(file),))
    command("features", budget=2, pools=pools)
    file.write_text("\n".join([*lines[1:], lines[0]]))
    with pytest.raises(UserError, match=r"text_feats.npy were extracted of other texts than .*texts.txt; features are"):
        command("select", budget=2, pools=pools, resume=True)


def test_a_share_of_bad_images_may_be_allowed_later(command, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "4.png").write_bytes(b"no image")
    pools = replace(TOY, images=(str(folder),), texts=(), bad_images=0.1)
    with pytest.raises(UserError, match=r"1 of 5 images cannot be decoded.*allow more than 0.1 by --bad_images"):
        command("features", pools=pools)
    assert command("features", pools=replace(pools, bad_images=0.2), resume=True).is_file()


def test_training_goes_on_with_what_it_began_with(command, tmp_path):
    first, other = command("features"), command("features", name="other", pools=replace(TOY, toy_texts=31))

    def train(manifest, *more):
        words = f"--student vit_tiny --batch_size 8 --epochs 2 --device cpu --save_dir {tmp_path / 'student'}".split()
        distill(parse(Distill, "distill", [*words, "--buffer_path", str(manifest.parent), *more])[0])

    train(first, "--steps", "1")
    with pytest.raises(UserError, match=r"holds a run on another text_feats; resume it with the files it began with"):
        train(other, "--resume")
    train(first, "--resume")


def test_options_that_a_manifest_leaves_idle_are_told(command, capsys):
    """What a manifest lists is known only once it is read."""
    manifest = command("features")
    asked = replace(TOY, images=(), texts=(), toy_images=25, pool_manifest=str(manifest))
    open_inputs(Distill(pools=asked))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert told == [
        f"note: --toy_{role} {number} does nothing without --{role} toy"
        for role, number in (("images", 25), ("texts", 30))
    ]


def test_a_killed_command_ends_in_the_same_files(command, monkeypatch):
    whole = command("features", "select", budget=5, name="whole")
    add, rows = clip_features._add, []

    def dying(writer, *batch):
        add(writer, *batch)
        rows.append(writer.done)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clip_features, "_add", dying)
        command("features", "select", budget=5, name="killed")
    with pytest.raises(UserError, match="already holds a run; --resume goes on with it"):
        command("features", "select", budget=5, name="killed")
    with pytest.raises(UserError, match=r"other options .budget was 5, is 6"):
        command("features", "select", budget=6, name="killed", resume=True)
    killed = command("features", "select", budget=5, name="killed", resume=True)
    one, two = contents(whole.parent), contents(killed.parent)
    assert {name: one[name] for name in one if name != "config.yaml"} == {
        name: two[name] for name in two if name != "config.yaml"
    }


def test_features_that_are_given_are_taken_as_they_are(command, tmp_path):
    first = command("features", name="first")
    (tmp_path / "texts.txt").write_text("a red ring\na blue star\n\na red  ring\nnothing of the kind\n")
    given = replace(TOY, texts=(str(tmp_path / "texts.txt"),), image_feats=(str(first.parent / "image_feats.npy"),))
    manifest = command("features", "select", budget=9, name="second", pools=given, feature_format="tsv")
    assert not (manifest.parent / "image_feats.npy").exists()
    tree = yaml.safe_load(manifest.read_text())
    assert tree["image_feats"] == [str(first.parent / "image_feats.npy")] and tree["texts"] == ["selected.tsv"]
    _, texts, _, _ = opened(manifest)
    assert {texts.text(row) for row in range(len(texts))} == {"a red ring", "a blue star", "nothing of the kind"}
    with pytest.raises(UserError, match=r"toy has 19 images, the features .* 20"):
        command("features", name="third", pools=replace(given, toy_images=19))


def test_a_selection_from_a_manifest_keeps_its_teacher(command):
    first = command("teacher", "features", name="first")
    listed = replace(TOY, images=(), texts=(), pool_manifest=str(first))
    second = command("select", budget=4, name="second", teacher="ViT-L/14", pools=listed)
    assert len(opened(second)[1]) == 4
    teacher = noted_teacher(second)
    assert teacher == noted_teacher(first) and load_clip(teacher["source"], "nowhere").fingerprint == teacher["weights"]


def test_a_budget_that_cannot_be_met_is_told(command, capsys):
    command("features", "select", budget=1000, name="greedy")
    assert "note: --budget 1000 is more than there is; all 30 different sentences are kept" in capsys.readouterr().out
    command("features", "select", budget=25, name="union", select=SelectConfig(select_mode="union", topk=1))
    assert "note: --budget 25 is more than images propose, which is " in capsys.readouterr().out


def test_images_that_cannot_be_decoded_own_no_sentence(command, cache, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (40, 40), (50 * number, 90, 0)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"")
    pools = replace(TOY, images=(str(folder),), bad_images=0.2)
    manifest = command("features", "select", budget=20, pools=pools)
    with open(manifest.parent / "selection.csv", encoding="utf-8", newline="") as file:
        assert {int(line["owner"]) for line in csv.DictReader(file)} == {0, 1, 2, 4}
    assert opened(manifest)[2].bad == {3}
    with pytest.raises(UserError, match=r"1 of 5 images cannot be decoded, such as 3.png .*--bad_images"):
        command("features", name="strict", pools=replace(pools, bad_images=0.1))


def test_one_pool_may_be_alone(command):
    manifest = command("features", pools=replace(TOY, texts=()))
    tree = yaml.safe_load(manifest.read_text())
    assert tree["image_feats"] == ["image_feats.npy"] and tree["texts"] == tree["text_feats"] == []


def test_a_teacher_may_come_by_itself(command):
    manifest = command("teacher", pools=PoolsConfig())
    assert not manifest.exists() and (manifest.parent / "teacher" / "config.json").is_file()


@pytest.mark.parametrize(
    ("told", "stages", "options"),
    [
        ("neither images nor sentences; give --images", ("features",), {"pools": PoolsConfig()}),
        ("--stages select needs to know how many", ("select",), {}),
        ("--stages select needs sentences, and features of", ("select",), {"budget": 3}),
        (
            "--stages select needs sentences, and",
            ("features", "select"),
            {"budget": 3, "pools": replace(TOY, texts=())},
        ),
        ("no CLIP at .*nowhere.*--teacher takes", ("features",), {"teacher": "./nowhere"}),
        ("--stages teacher trains the tiny CLIP, not ViT-B/32", ("teacher",), {"teacher": "ViT-B/32"}),
    ],
)
def test_what_cannot_be_is_refused(command, told, stages, options):
    with pytest.raises(UserError, match=told):
        command(*stages, **options)


def test_options_that_do_nothing_are_told():
    argv = ["--teacher_lr", "1", "--budget", "3", "--select_order", "image", "--select_mode", "union"]
    cfg, _ = parse(Buffer, "buffer", argv)
    assert [line.split()[0] for line in idle_options(cfg)] == ["--teacher_lr", "--budget", "--select_order"]
    cfg, _ = parse(Buffer, "buffer", ["--stages", "teacher", "select", "--budget", "3", "--teacher_lr", "1"])
    assert not idle_options(cfg)


def test_a_manifest_need_not_tell_of_a_teacher(tmp_path):
    (tmp_path / "pools.yaml").write_text(json.dumps({"images": ["toy"]}))
    assert noted_teacher(tmp_path / "pools.yaml") == {}
