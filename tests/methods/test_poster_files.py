"""Files of posters: our own, and those that others publish."""

import pytest
import torch

from methods.poster_files import FORMAT, load_poster, publish
from utils.errors import UserError
from utils.files import save_tensors

CANVAS = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1))
LABELS = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(2))
META = {"format": FORMAT, "order": [[0, 2], [1, 3]], "config": {"method": "podd"}, "classes": list("abcd"), "step": 7}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def own(**changes):
    """A distilled file of ours, parts of it changed (None: left out)."""
    state = {"poster": CANVAS, "label_map": LABELS, "lr": torch.tensor(0.003), "meta": META} | changes
    save_tensors("distilled.pt", {name: part for name, part in state.items() if part is not None})
    return "distilled.pt"


def refused(path) -> str:
    """The one line that says why a file is not taken."""
    with pytest.raises(UserError) as error:
        load_poster(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


class TestOwn:
    def test_it_comes_back(self):
        zca = {"mean": torch.zeros(3), "matrix": torch.eye(3)}
        found = load_poster(own(zca=zca))
        assert torch.equal(found.poster, CANVAS) and torch.equal(found.label_map, LABELS)
        assert (
            found.lr == pytest.approx(0.003) and found.meta == META and torch.equal(found.zca["matrix"], torch.eye(3))
        )

    def test_without_labels_and_whitening(self):
        found = load_poster(own(label_map=None))
        assert found.label_map is None and found.zca == {}

    def test_labels_beside_it_are_not_its(self):
        """They are a published poster's; a file of ours has its own."""
        torch.save(LABELS[None], "run_label.pt")
        torch.save({"poster": CANVAS, "lr": torch.tensor(0.1), "meta": META}, "run_poster.pt")
        assert load_poster("run_poster.pt").label_map is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"poster": None},
            {"lr": None},
            {"lr": torch.ones(2)},
            {"lr": "fast"},
            {"meta": None},
            {"meta": 3},
            {"meta": []},
            {"meta": {}},
            {"meta": META | {"format": "new"}},
            {"meta": META | {"order": [[0, 1], [2]]}},
            {"meta": META | {"order": "PoCO"}},
            {"meta": {name: value for name, value in META.items() if name != "order"}},
            {"meta": {name: value for name, value in META.items() if name != "classes"}},
            {"meta": {name: value for name, value in META.items() if name != "config"}},
        ],
    )
    def test_files_of_something_else(self, changes):
        assert "distilled.pt is no file of a distilled poster" in refused(own(**changes))

    def test_distilled_images_are_no_poster(self):
        save_tensors("images.pt", {"images": torch.rand(4, 3, 8, 8), "lr": torch.tensor(0.1), "meta": {"format": 1}})
        assert "images.pt is no file of a distilled poster" in refused("images.pt")

    @pytest.mark.parametrize("part, good", [("poster", CANVAS), ("label_map", LABELS)])
    @pytest.mark.parametrize("how", ["nan", "inf", "empty", "flat", "a list"])
    def test_maps_that_are_none(self, part, good, how):
        broken = {
            "nan": good / 0 * 0,
            "inf": good / 0,
            "empty": good[:, :0],
            "flat": good[0],
            "a list": good.tolist(),
        }[how]
        assert refused(own(**{part: broken})).endswith("is empty, not finite, or no map; take an earlier file")

    @pytest.mark.parametrize("rate", [0.0, -0.01, float("nan"), float("inf")])
    def test_rates(self, rate):
        assert f"its inner rate is {rate:g}, which nobody can train at" in refused(own(lr=torch.tensor(rate)))

    def test_a_newer_format(self):
        says = refused(own(meta=META | {"format": FORMAT + 1}))
        assert says == f"distilled.pt is of format {FORMAT + 1}, newer than this {FORMAT}; update the toolkit"


class TestPublished:
    def test_a_pair(self):
        """As the released code leaves it: parameters on whatever device, labels of any scale."""
        torch.save(torch.nn.Parameter(CANVAS[None]), "3k2j_poster.pt")
        torch.save((LABELS[None] * 9 - 1).double().requires_grad_(), "3k2j_label.pt")
        found = load_poster("3k2j_poster.pt")
        assert torch.equal(found.poster, CANVAS) and not found.poster.requires_grad
        assert not found.label_map.requires_grad and found.label_map.dtype == torch.float32
        torch.testing.assert_close(found.label_map, (LABELS * 9 - 1).clamp(min=0))
        assert (found.label_map == 0).any()  # negative scores would be no shares
        assert (found.lr, found.meta, found.zca) == (None, {}, {})

    def test_a_poster_alone(self):
        torch.save(CANVAS[None], "3k2j_poster.pt")
        torch.save(LABELS[None], "other_label.pt")
        assert load_poster("3k2j_poster.pt").label_map is None
        torch.save(CANVAS[None], "art.pt")
        assert load_poster("art.pt").label_map is None

    def test_runs_named_after_posters(self):
        """Only the last word of the name tells what is inside."""
        torch.save(CANVAS[None], "my_poster_2_poster.pt")
        torch.save(LABELS[None], "my_poster_2_label.pt")
        assert torch.equal(load_poster("my_poster_2_poster.pt").label_map, LABELS)

    @pytest.mark.parametrize("label_map", [None, LABELS])
    def test_what_we_publish_comes_back(self, tmp_path, label_map):
        publish(tmp_path / "run", CANVAS, label_map)
        assert torch.load(tmp_path / "run/best_poster.pt", weights_only=True).shape == (1, 3, 6, 7)
        found = load_poster(tmp_path / "run" / "best_poster.pt")
        assert torch.equal(found.poster, CANVAS)
        assert found.label_map is None if label_map is None else torch.equal(found.label_map, LABELS)
        assert len(list((tmp_path / "run").iterdir())) == (1 if label_map is None else 2)

    @pytest.mark.parametrize("name", ["run_poster.pt", "run_label.pt"])
    @pytest.mark.parametrize(
        "content, says",
        [
            (CANVAS, "neither a distilled file nor a published tensor"),
            (torch.stack([CANVAS, CANVAS]), "neither a distilled file nor a published tensor"),
            ([CANVAS[None]], "neither a distilled file nor a published tensor"),
            (torch.tensor(3), "neither a distilled file nor a published tensor"),
            (CANVAS[None] / 0, "is empty, not finite, or no map"),
            (CANVAS[None] / 0 * 0, "is empty, not finite, or no map"),
            (CANVAS[None, :, :0], "is empty, not finite, or no map"),
        ],
    )
    def test_what_is_none(self, name, content, says):
        torch.save(CANVAS[None], "run_poster.pt")
        torch.save(LABELS[None], "run_label.pt")
        torch.save(content, name)
        with pytest.raises(UserError, match=says) as error:
            load_poster("run_poster.pt")
        assert name in str(error.value) and "\n" not in str(error.value)


class TestDamaged:
    def test_missing(self):
        assert refused("nowhere_poster.pt") == "no poster at nowhere_poster.pt"

    @pytest.mark.parametrize("kept", [0, 10, -100])
    @pytest.mark.parametrize("name", ["distilled.pt", "run_poster.pt"])
    def test_cut_off(self, tmp_path, name, kept):
        own()
        torch.save(CANVAS[None], "run_poster.pt")
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:kept])
        assert "cannot be read" in refused(name)

    def test_text(self, tmp_path):
        (tmp_path / "run_poster.pt").write_text("a poster")
        assert "cannot be read" in refused("run_poster.pt")

    def test_code_is_not_run(self, tmp_path):
        torch.save(Trap(), tmp_path / "run_poster.pt")
        assert "cannot be read" in refused("run_poster.pt")
        assert not (tmp_path / "sprung").exists()


class Trap:
    """Writes a file where it is unpickled."""

    def __reduce__(self):
        return open, ("sprung", "w")
