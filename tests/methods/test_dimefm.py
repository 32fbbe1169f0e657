"""DIME-FM's losses: worked by hand, in float64, and what must hold of them whatever the features."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from methods.dimefm import Distill, LossConfig, dime_losses, score_kl, similarity
from utils.config import idle_options, parse
from utils.errors import UserError

ALL = {"use_pvl_loss": True, "use_udist_loss": True, "w_udist_loss": 0.1}
# Example C of the specification: teacher images, sentences, student images.
V = [[3, 0, 4], [0, 1, 0], [1, 0, 0]]
U = [[1, 0, 0], [0, 0, 2], [0, 3, 4]]
S = [[1, 0, 0], [0, 4, 3], [0, 0, 1]]
EYE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
RING = [[1, 1, 0], [0, 1, 1], [1, 0, 1]]


def rows(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def terms(images, texts, student, scale=100.0, temperatures=(1.0, 3.0, 7.0), **options) -> dict[str, float]:
    names = ("t_vl", "t_pvl", "t_udist")
    cfg = LossConfig(log_scale=scale, **dict(zip(names, temperatures, strict=True)), **{**ALL, **options})
    found = dime_losses(*map(rows, (images, texts, student)), cfg)
    return {name: float(value) for name, value in found.items()}


def drawn(count: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cosines_of_example_c():
    v, u, s = map(rows, (V, U, S))
    wanted = {
        "vu": (v, u, [[0.6, 0.8, 0.64], [0, 0, 0.6], [1, 0, 0]]),
        "su": (s, u, [[1, 0, 0], [0, 0.6, 0.96], [0, 1, 0.8]]),
        "vv": (v, v, [[1, 0, 0.6], [0, 1, 0], [0.6, 0, 1]]),
        "sv": (s, v, [[0.6, 0, 1], [0.48, 0.8, 0], [0.8, 0, 0]]),
        "ss": (s, s, [[1, 0, 0], [0, 1, 0.6], [0, 0.6, 1]]),
    }
    for x, y, cosines in wanted.values():
        torch.testing.assert_close(similarity(x, y, 1.0), rows(cosines))


def test_equal_features_lose_nothing():
    assert terms(EYE, EYE, EYE) == pytest.approx({"vl": 0, "pvl": 0, "udist": 0, "loss": 0}, abs=1e-12)


@pytest.mark.parametrize(
    ("scale", "temperatures", "vl", "pvl", "udist"),
    [
        (1, (1, 1, 1), 0.176104, 0.176104, 0.061981),
        (10, (1, 3, 7), 1.385788, 1.053980, 0.119262),
        (100, (1, 3, 7), 2 * math.log(2), 1.386294, 0.003139),
    ],
)
def test_example_b(scale, temperatures, vl, pvl, udist):
    found = terms(EYE, EYE, RING, scale, temperatures)
    assert [found[name] for name in ("vl", "pvl", "udist")] == pytest.approx([vl, pvl, udist], abs=2e-6)


# scale, temperatures: i2t, t2i, vl, rows, cols, pvl, rows + cols, udist, 0.7 / 0.3 / 0, 0.68 / 0.22 / 0.10
EXAMPLE_C = [
    (
        *(1, (1, 1, 1), 0.199635, 0.224496, 0.424131, 0.085976, 0.089746, 0.171953, 0.175722),
        *(0.106129, 0.348478, 0.336852),
    ),
    (
        *(10, (1, 3, 7), 6.134548, 8.327651, 14.462199, 0.855740, 0.885595, 1.711481, 1.741335),
        *(0.189214, 10.636983, 10.229742),
    ),
    (
        *(100, (1, 3, 7), 66.666666, 98.061076, 164.727742, 13.333305, 13.333728, 26.666609, 26.667033),
        *(0.037566, 123.309402, 117.885275),
    ),
]


@pytest.mark.parametrize("row", EXAMPLE_C, ids=lambda row: f"scale {row[0]}")
def test_example_c(row):
    scale, temperatures, i2t, t2i, vl, row_kl, column_kl, pvl, both, udist, default, third = row
    near = {"abs": 2e-6}
    v, u, s = map(rows, (V, U, S))
    wanted, found = similarity(v, u, scale), similarity(s, u, scale)
    assert float(score_kl(wanted, found, temperatures[0])) == pytest.approx(i2t, **near)
    assert float(score_kl(wanted.T, found.T, temperatures[0])) == pytest.approx(t2i, **near)
    wanted, found = similarity(v, v, scale), similarity(s, v, scale)
    assert float(score_kl(wanted, found, temperatures[1])) == pytest.approx(row_kl, **near)
    assert float(score_kl(wanted.T, found.T, temperatures[1])) == pytest.approx(column_kl, **near)
    found = terms(V, U, S, scale, temperatures)
    assert [found[name] for name in ("vl", "pvl", "udist")] == pytest.approx([vl, pvl, udist], **near)
    assert terms(V, U, S, scale, temperatures, pvl_mode="symmetric")["pvl"] == pytest.approx(both, **near)
    released = terms(V, U, S, scale, temperatures, use_udist_loss=False)
    assert released["loss"] == pytest.approx(default, **near) and "udist" not in released
    weights = {"w_vl_loss": 0.68, "w_pvl_loss": 0.22, "w_udist_loss": 0.10}
    assert terms(V, U, S, scale, temperatures, **weights)["loss"] == pytest.approx(third, **near)


def test_fewer_images_than_sentences():
    v, u, s = rows(V[:2]), rows(U), rows(S[:2])
    wanted, found = similarity(v, u, 10), similarity(s, u, 10)
    assert float(score_kl(wanted, found, 1)) == pytest.approx(4.139245, abs=2e-6)
    assert float(score_kl(wanted.T, found.T, 1)) == pytest.approx(3.692945, abs=2e-6)
    assert terms(V[:2], U, S[:2], 10)["vl"] == pytest.approx(7.832190, abs=2e-6)
    wanted, found = similarity(v, v, 10), similarity(s, v, 10)
    assert float(score_kl(wanted, found, 3)) == pytest.approx(0.114293, abs=2e-6)
    assert float(score_kl(wanted.T, found.T, 3)) == pytest.approx(0.193042, abs=2e-6)
    assert terms(V[:2], U, S[:2], 10)["udist"] == pytest.approx(0, abs=1e-12)  # both pairs are orthogonal


def test_one_direction_does_not_see_shifts_of_rows():
    wanted = rows([[1, 2, 3], [0, 1, 0], [2, 2, 5]])
    shifted = wanted + rows([[5], [0], [-1]])
    assert float(score_kl(wanted, shifted, 1)) == pytest.approx(0, abs=1e-12)
    assert float(score_kl(wanted.T, shifted.T, 1)) == pytest.approx(2.888526, abs=2e-6)
    assert float(score_kl(wanted.T, wanted.T + 3, 1)) == pytest.approx(0, abs=1e-12)


def test_scale_and_temperature_are_one_thing():
    one, other = terms(V, U, S, 100, (1, 3, 7)), terms(V, U, S, 1, (0.01, 0.03, 0.07))
    assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize(("temperature", "wanted"), [(1, 9.966e-5), (3, 9.989e-5), (7, 9.995e-5)])
def test_small_differences_shrink_as_the_square_of_the_temperature(temperature, wanted):
    kl = score_kl(torch.zeros(1, 3, dtype=torch.float64), rows([[0.01, -0.02, 0.01]]), temperature)
    assert float(kl) * temperature**2 == pytest.approx(wanted, abs=1e-8)


def test_a_feature_of_zeros_is_no_nan():
    student = rows(S)
    student[1] = 0
    found = dime_losses(rows(V), rows(U), student.requires_grad_(), LossConfig(**ALL))
    found["loss"].backward()
    assert all(value.isfinite() for value in found.values()) and student.grad.isfinite().all()


def test_only_directions_count_and_turns_by_the_terms_that_see_them():
    images, texts, student = drawn(6, 0), drawn(8, 1), drawn(6, 2)
    cfg, lengths = LossConfig(**ALL, log_scale=5.0), torch.linspace(0.1, 9, 6, dtype=torch.float64)[:, None]
    turn = torch.linalg.qr(drawn(5, 3))[0]
    base = dime_losses(images, texts, student, cfg)
    for other in (
        dime_losses(images * 3, texts / 7, student * lengths, cfg),
        dime_losses(images @ turn, texts @ turn, student @ turn, cfg),
    ):
        torch.testing.assert_close(base, other)
    turned = dime_losses(images, texts, student @ turn, cfg)
    torch.testing.assert_close(base["udist"], turned["udist"])
    assert all(abs(base[name] - turned[name]) > 0.1 for name in ("vl", "pvl"))


@pytest.mark.parametrize("mode", ["rows2", "symmetric"])
def test_gradients(mode):
    images, texts, student = drawn(4, 4), drawn(6, 5), drawn(4, 6).requires_grad_()
    cfg = LossConfig(**ALL, pvl_mode=mode, log_scale=4.0)
    assert gradcheck(lambda s: dime_losses(images, texts, s, cfg)["loss"], student)
    dime_losses(images, texts, student, cfg)["loss"].backward()
    along = (student.grad * student).sum(1)
    assert student.grad.norm() > 0.01 and along.abs().max() < 1e-12  # lengths do not count


def test_half_precision_elsewhere_leaves_similarities_alone():
    images, texts, student = (drawn(8, seed, 768).float() for seed in (7, 8, 9))
    exact = dime_losses(images, texts, student, LossConfig(**ALL))
    with torch.autocast("cpu", torch.bfloat16):
        found = dime_losses(images, texts, student, LossConfig(**ALL))
    torch.testing.assert_close(found, exact, rtol=0, atol=0)
    assert exact["loss"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_precision_are_compared_in_full(dtype):
    images, texts = (drawn(8, seed, 768).to(dtype) for seed in (7, 8))
    found = similarity(images, texts)
    torch.testing.assert_close(found, similarity(images.float(), texts.float()), rtol=0, atol=0)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_udist_loss": True}, "--use_udist_loss with --w_udist_loss 0 only costs time"),
        ({"use_pvl_loss": True, "w_pvl_loss": 0.0}, "--use_pvl_loss with --w_pvl_loss 0 only costs time"),
        ({"w_vl_loss": 0.0}, "nothing would be learned"),
    ],
)
def test_terms_that_do_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**options).check()


def test_only_training_is_shared_by_processes(refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in ("buffer", "eval"):
        line = refused(verb, "--method", "dimefm")
        assert line.startswith(f"{verb}.py --method dimefm is the work of one process") and "leave out torchrun" in line
    assert "nowhere" in refused("distill", "--method", "dimefm", "--pool_manifest", "nowhere")


def test_a_place_of_files_that_flags_name_is_not_looked_into():
    cfg, _ = parse(Distill, "distill", ["--images", "x.tsv", "--buffer_path", "y"])
    assert [line.split()[:2] for line in idle_options(cfg)] == [["--buffer_path", "y"]]
    cfg, _ = parse(Distill, "distill", ["--buffer_path", "y"])
    assert not idle_options(cfg)


def test_options_of_terms_that_are_off_are_told():
    assert set(LossConfig().idle()) == {"t_pvl", "w_pvl_loss", "pvl_mode", "t_udist", "w_udist_loss"}
    assert LossConfig(**ALL).idle() == {}
