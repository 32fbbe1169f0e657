"""Whitening: figures worked out by hand, against numpy, and as a file."""

import numpy as np
import pytest
import torch

from data.zca import ZCA, fit_zca
from utils.errors import UserError

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
