"""What eval.py judges of class images: budgets, chance, folders of any origin, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from methods.core.coresets import herding
from methods.prototype_files import Manifest
from methods.prototype_sources import (
    RealImages,
    distilled_files,
    image_folder,
    labels_of,
    selected,
)
from utils.errors import UserError

IDENTS = ("cat", "ant", "bee")  # the catalogue's order is not the sorted one
SORTED = ["ant", "bee", "cat"]


def catalogue(counts=(6, 8, 7), idents=IDENTS):
    train = [[Path(f"real/train/{ident}/{i}.png") for i in range(n)] for ident, n in zip(idents, counts, strict=True)]
    kinds = [SimpleNamespace(ident=ident) for ident in idents]
    return SimpleNamespace(kinds=kinds, train_paths=train.__getitem__)


def features(ident, files):
    """One number an image: 0, 1, 2, ..."""
    return torch.tensor([[float(file.stem)] for file in files])


def real(holdout=0.0, seed=0, **more):
    return RealImages(catalogue(**more), seed, holdout, features)


def names(files):
    return [[path.stem for path in some] for some in files]


def folders(root, *names, images=3, suffix="png"):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{name}-image{i}.{suffix}").touch()
    return root


def test_classes_are_numbered_in_the_sorted_order_of_their_folders():
    found = real()
    assert found.idents == SORTED
    assert [[*{path.parent.name for path in some}] for some in found.kept] == [["ant"], ["bee"], ["cat"]]
    assert labels_of(found.kept).tolist() == [0] * 8 + [1] * 7 + [2] * 6


def test_random_images_differ_from_repeat_to_repeat_and_keep_the_budget():
    draws = [real().random(3, number) for number in range(4)]
    assert all(len({*some}) == 3 for files in draws for some in files)
    assert len({str(files) for files in draws}) > 1
    assert draws == [real().random(3, number) for number in range(4)]
    assert draws != [real(seed=1).random(3, number) for number in range(4)]


def test_what_is_drawn_for_a_class_does_not_depend_on_the_others():
    alone = RealImages(catalogue(counts=(8,), idents=("ant",)), 0, 0.25, features)
    assert alone.random(3, 5) == real(0.25).random(3, 5)[:1]
    assert alone.held == real(0.25).held[:1]


def test_coresets_have_exactly_the_budget_and_are_the_same_for_everybody():
    found = real()
    chosen = found.chosen("herding", 3)
    assert names(chosen)[0] == [str(row) for row in herding(torch.arange(8.0)[:, None], 3).tolist()]
    assert [len({*some}) for some in found.chosen("medoid", 4)] == [4, 4, 4]
    assert found.chosen("medoid", 2) == real().chosen("medoid", 2)


def test_medoids_are_real_images_in_the_middle_of_their_clusters():
    def two_heaps(ident, files):
        return torch.tensor([[0.0], [1.0], [2.0], [100.0], [101.0], [102.0]])

    found = RealImages(catalogue(counts=(6,), idents=("ant",)), 0, 0.0, two_heaps).chosen("medoid", 2)
    assert sorted(names(found)[0]) == ["1", "4"]


def test_held_out_images_are_in_no_source():
    found = real(0.25)
    assert [len(some) for some in found.held] == [2, 2, 2]  # a quarter of 8, 7 and 6, rounded
    for kept, held, all_of in zip(found.kept, found.held, real().kept, strict=True):
        assert not {*kept} & {*held} and sorted([*kept, *held]) == all_of
    everywhere = [found.random(4, 0), found.chosen("herding", 4), found.chosen("medoid", 4)]
    assert not any({*some} & {*held} for files in everywhere for some, held in zip(files, found.held, strict=True))


def test_too_few_real_images_are_told_by_the_class():
    with pytest.raises(UserError, match="class cat has 6 real training images, fewer than --ipc 7"):
        real().check(7)
    real().check(6)
    with pytest.raises(UserError, match=r"--holdout 0.1 takes all 1 training images of \w+; lower it"):
        real(0.1, counts=(1, 8, 7))


def test_distilled_folders_are_found_by_name(tmp_path):
    files, note = distilled_files(folders(tmp_path, *IDENTS, ".hidden"), SORTED)
    assert not note
    assert names(files) == [[f"{name}-image{i}" for i in range(3)] for name in SORTED]


def test_numbered_folders_are_the_classes_in_sorted_order(tmp_path):
    files, note = distilled_files(folders(tmp_path, "00000", "00001", "00002"), SORTED)
    assert [some[0].parent.name for some in files] == ["00000", "00001", "00002"]
    assert "00000 is taken to be ant, 00002 cat" in note


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ((), "holds no class folders"),
        (("ant", "bee"), "lacks 1 of the 3 classes, such as cat; class folders are found by name"),
        (("ant", "bee", "cats"), r"lacks 1 .* such as cat; it has cats \(did you mean 'cat'\?\)"),
        (("00000", "00001"), "lacks 3 of the 3 classes, such as ant; it has 00000"),
        ((*SORTED, "dog"), "has 1 folders of other classes, such as dog"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, there, message):
    with pytest.raises(UserError, match=message):
        distilled_files(folders(tmp_path / "made", *there) if there else tmp_path, SORTED)


def test_classes_that_nclass_left_out_are_passed_over(tmp_path):
    files, _ = distilled_files(folders(tmp_path, *SORTED, "dog"), SORTED, ["dog"])
    assert len(files) == 3


def test_folders_may_spell_a_class_otherwise(tmp_path):
    spelled = {"Ant": "ant", "bees": "bee"}
    files, _ = distilled_files(folders(tmp_path, "Ant", "bees", "cat"), SORTED, (), spelled.get)
    assert [some[0].parent.name for some in files] == ["Ant", "bees", "cat"]
    folders(tmp_path, "ant")
    with pytest.raises(UserError, match=r"two folders of .* are of one class"):
        distilled_files(tmp_path, SORTED, (), spelled.get)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"no folder of distilled images at .*nowhere"):
        distilled_files(tmp_path / "nowhere", SORTED)
    folders(tmp_path, *SORTED, suffix="txt")
    with pytest.raises(UserError, match="ant holds no images"):
        distilled_files(tmp_path, SORTED)


def test_a_run_folder_stands_for_its_images(tmp_path):
    assert image_folder(tmp_path) == tmp_path
    Manifest(tmp_path).record("data", dataset="toy")
    assert image_folder(tmp_path) == tmp_path / "images"
    elsewhere = tmp_path / "elsewhere"
    Manifest(tmp_path).record("images", path=str(elsewhere))
    assert image_folder(tmp_path) == tmp_path / "images"  # it was moved along with the run
    elsewhere.mkdir()
    assert image_folder(str(tmp_path)) == elsewhere


def test_the_first_files_or_drawn_ones(tmp_path):
    files, _ = distilled_files(folders(tmp_path, *SORTED, images=9), SORTED)
    assert selected(files, 2, "random", SORTED, 0, 0) == [some[:2] for some in files]
    draws = [selected(files, 2, "drawn", SORTED, 0, number) for number in range(4)]
    assert all(len({*some}) == 2 for found in draws for some in found) and len({str(found) for found in draws}) > 1
    with pytest.raises(UserError, match="has 9 images of class ant, fewer than --ipc 10"):
        selected(files, 10, "random", SORTED, 0, 0)
