"""Whitening: figures worked out by hand, against numpy, and as a file."""

import numpy as np
import pytest
import torch

from data.zca import ZCA, _unit, fit_unit_zca, fit_zca
from utils.errors import UserError
from utils.files import digest

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]], dtype=torch.float64).view(3, 1, 1, 2)
PHOTOS = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_three_rows():
    zca = fit_zca(ROWS)
    close = {"rtol": 0, "atol": 1e-10}
    a, b = 0.5474768622, 0.1425886971
    torch.testing.assert_close(zca.mean, torch.tensor([3.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(zca.matrix, torch.tensor([[a, b], [b, a]], dtype=torch.float64), **close)
    a, b = 1.9594777408, -0.5103400662
    torch.testing.assert_close(zca.inverse, torch.tensor([[a, b], [b, a]], dtype=torch.float64), **close)
    white = zca.whiten(ROWS)
    assert white.shape == ROWS.shape
    rows = [[-1.0949537244, -0.2851773943], [0.2851773943, 1.0949537244], [0.8097763302, -0.8097763302]]
    torch.testing.assert_close(white.flatten(1), torch.tensor(rows, dtype=torch.float64), **close)
    assert torch.linalg.eigvalsh(torch.cov(white.flatten(1).T)).tolist() == pytest.approx([0.9523810, 0.9836066])
    torch.testing.assert_close(zca.unwhiten(white), ROWS, rtol=0, atol=4e-15)


def test_against_numpy():
    flat = PHOTOS.flatten(1).double().numpy()
    vectors, values, _ = np.linalg.svd(np.cov(flat.T))
    expected = vectors @ np.diag((values + 0.1) ** -0.5) @ vectors.T
    zca = fit_zca(PHOTOS)
    assert zca.matrix.dtype == torch.float32
    np.testing.assert_allclose(zca.matrix.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(zca.whiten(PHOTOS).flatten(1).numpy(), (flat - flat.mean(0)) @ expected, atol=1e-6)


def test_fewer_images_than_values():
    """Eigenvalues that are zero, or negative by rounding, leave a finite transformation that can be undone."""
    zca = fit_zca(PHOTOS[:5])
    assert torch.isfinite(zca.matrix).all()
    assert torch.linalg.eigvalsh(zca.matrix.double()).max() <= 0.1**-0.5 + 1e-5
    torch.testing.assert_close(zca.unwhiten(zca.whiten(PHOTOS)), PHOTOS, rtol=0, atol=1e-5)


def test_bytes_are_shares_of_255(monkeypatch):
    whole = (PHOTOS * 255).round().to(torch.uint8)
    monkeypatch.setattr("data.zca._ROWS", 7)  # in several parts
    one, other = fit_zca(whole), fit_zca(whole.float() / 255)
    torch.testing.assert_close(one.matrix, other.matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.mean, other.mean)


def test_one_image_or_many():
    zca = fit_zca(PHOTOS)
    torch.testing.assert_close(zca.whiten(PHOTOS[3]), zca.whiten(PHOTOS)[3], rtol=0, atol=1e-6)
    grid = PHOTOS.view(8, 5, 3, 4, 4)
    assert zca.unwhiten(zca.whiten(grid)).shape == grid.shape


def test_whitening_is_differentiable():
    zca = fit_zca(ROWS)
    images = ROWS.clone().requires_grad_()
    assert torch.autograd.gradcheck(zca.whiten, (images,))


def test_saved_and_loaded(tmp_path):
    zca = fit_zca(PHOTOS)
    zca.save(tmp_path / "zca.safetensors")
    for copy in (ZCA.load(tmp_path / "zca.safetensors"), ZCA.from_state(zca.state())):
        assert copy.digest == zca.digest
        assert torch.equal(copy.whiten(PHOTOS), zca.whiten(PHOTOS))
        torch.testing.assert_close(copy.inverse, zca.inverse, rtol=0, atol=1e-6)  # worked out of the matrix
    torch.save(zca.state(), tmp_path / "zca.pt")
    assert ZCA.from_state(torch.load(tmp_path / "zca.pt", weights_only=True)).digest == zca.digest
    assert fit_zca(PHOTOS[:30]).digest != zca.digest


def test_what_is_no_whitening(tmp_path):
    with pytest.raises(UserError, match="no whitening at "):
        ZCA.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"\1\2")
    with pytest.raises(UserError, match=r"cut cannot be read .* delete it"):
        ZCA.load(tmp_path / "cut")
    for state in (
        {"mean": torch.zeros(3)},
        {"mean": torch.zeros(3), "matrix": torch.zeros(2, 2)},
        {"mean": 1, "matrix": 2},
    ):
        with pytest.raises(UserError, match="not a mean and a matrix"):
            ZCA.from_state(state)


# --- the kind of PoDD ---

FIVE = torch.tensor([[1, 2, 3, 4], [2, 1, 4, 3], [4, 0, 1, 3], [0, 5, 2, 1], [3, 3, 1, 5]], dtype=torch.float64)
FIVE = FIVE.view(5, 1, 2, 2)


def test_five_rows_of_unit_length():
    zca = fit_unit_zca(FIVE)
    assert (zca.kind, zca.unit) == ("podd", True) and not zca.mean.any()
    close = {"rtol": 0, "atol": 1e-6}
    # The matrix has the vectors of the second moment and (value + 0.1 / 4)^-1/2.
    values = torch.linalg.eigvalsh(zca.matrix).flip(0) ** -2 - 0.025
    torch.testing.assert_close(values, torch.tensor([0, 0.241193, 0.315303, 0.443504], dtype=torch.float64), **close)
    assert float(values.sum()) == pytest.approx(1)
    white = zca.whiten(FIVE)
    first = torch.tensor([-1.236485, -0.297681, 0.323120, 1.211046], dtype=torch.float64)
    torch.testing.assert_close(white[0].flatten(), first, **close)
    torch.testing.assert_close(fit_unit_zca(255 * FIVE).whiten(255 * FIVE), white, rtol=0, atol=1e-12)
    torch.testing.assert_close(fit_unit_zca(FIVE.to(torch.uint8)).whiten(FIVE.float()), white.float(), **close)


def test_unit_kind_is_undone_to_mean_0_and_length_1():
    zca = fit_unit_zca(PHOTOS)
    assert zca.matrix.dtype == torch.float32
    flat = zca.unwhiten(zca.whiten(PHOTOS)).flatten(1)
    centred = PHOTOS.flatten(1) - PHOTOS.flatten(1).mean(1, keepdim=True)
    torch.testing.assert_close(flat, centred / centred.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_an_image_of_one_tone_becomes_zeros(kind):
    """Rounding leaves something of it, which must not be scaled to length 1."""
    images = PHOTOS.to(kind).clone()
    images[3], images[4] = 0.1, 0.0
    zca = fit_unit_zca(images)
    white = zca.whiten(images)
    assert torch.isfinite(white).all() and not white[3:5].any() and white[5].any()
    nearly = torch.full((3, 64, 64), 255.0, dtype=kind).index_put((torch.tensor(0),) * 3, torch.tensor(254.0).to(kind))
    assert float(_unit(nearly.flatten() / 255).norm()) == pytest.approx(1, abs=1e-2)
    blank = fit_unit_zca(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8))
    assert torch.isfinite(blank.matrix).all() and torch.isfinite(blank.inverse).all()


def test_unit_whitening_is_differentiable():
    zca = fit_unit_zca(FIVE)
    assert torch.autograd.gradcheck(zca.whiten, (FIVE.clone().requires_grad_(),))
    blank = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    zca.whiten(blank).sum().backward()
    assert torch.isfinite(blank.grad).all()


def test_unit_kind_saved_and_loaded(tmp_path):
    zca = fit_unit_zca(PHOTOS)
    zca.save(tmp_path / "zca.safetensors")
    for copy in (ZCA.load(tmp_path / "zca.safetensors"), ZCA.from_state(zca.state()), zca.to("cpu")):
        assert copy.digest == zca.digest and copy.kind == "podd"
        assert torch.equal(copy.whiten(PHOTOS), zca.whiten(PHOTOS))
    assert zca.to("meta").unit
    assert ZCA(zca.mean, zca.matrix).digest != zca.digest
    with pytest.raises(UserError, match="not a mean and a matrix"):
        ZCA.from_state(zca.state() | {"unit": torch.zeros(2)})


def test_state_and_digest_of_the_first_kind_are_those_of_old_files():
    zca = ZCA(torch.zeros(2), torch.eye(2))
    assert set(zca.state()) == {"mean", "matrix"} and zca.kind == "mtt"
    assert zca.digest == digest(zca.mean, zca.matrix)


def test_what_is_seen_is_spread_around_its_own_middle():
    zca, first = fit_unit_zca(PHOTOS), fit_zca(PHOTOS)
    seen = zca.visible(zca.whiten(PHOTOS)).flatten(1)
    torch.testing.assert_close(seen.mean(1), torch.full((40,), 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.std(1, correction=0), torch.full((40,), 1 / 6), rtol=0, atol=1e-5)
    assert torch.corrcoef(torch.stack([seen[0], PHOTOS[0].flatten()]))[0, 1] > 0.999
    assert torch.equal(zca.visible(torch.zeros(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 0.5))
    assert torch.equal(first.visible(PHOTOS), first.unwhiten(PHOTOS))
