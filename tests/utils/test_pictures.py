"""Grids and pictures, pixel by pixel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from utils.pictures import clip_std, open_image, png_bytes, save_grid, to_uint8


def read(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_grid_is_pixel_exact(tmp_path):
    # Three pictures of 1 x 2 pixels, each its own range; red, green and blue differ.
    images = torch.tensor([[[[0.0, 1]], [[2, 3]], [[4, 4]]], [[[-8.0, 0]], [[0, 0]], [[8, 8]]], [[[5.0, 5]]] * 3])
    save_grid(tmp_path / "new folder/grid.png", images, per_row=2)
    grid = read(tmp_path / "new folder/grid.png")
    expected = torch.zeros(3, 2 * 3 + 2, 2 * 4 + 2, dtype=torch.uint8)
    expected[:, 2, 2:4] = torch.tensor([[0, 64], [128, 191], [255, 255]])
    expected[:, 2, 6:8] = torch.tensor([[0, 128], [128, 128], [255, 255]])
    # The third starts the second row; it has one value only and becomes black rather than a division by zero.
    assert torch.equal(grid, expected)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["grid.png"]


def test_scale_over_all(tmp_path):
    images = torch.stack([torch.zeros(3, 1, 1), torch.full((3, 1, 1), 5.0), torch.full((3, 1, 1), 10.0)])
    save_grid(tmp_path / "grid.png", images, scale_each=False)
    grid = read(tmp_path / "grid.png")
    assert grid.shape == (3, 5, 11)  # no wider than the three pictures, though ten would fit
    assert grid[0, 2].tolist() == [0, 0, 0, 0, 0, 128, 0, 0, 255, 0, 0]


def test_upscale_makes_blocks(tmp_path):
    image = torch.tensor([[0.0, 1], [1, 0]]).expand(1, 3, 2, 2)
    save_grid(tmp_path / "grid.png", image, upscale=4)
    inner = read(tmp_path / "grid.png")[0, 2:-2, 2:-2]
    assert torch.equal(inner, torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).kron(torch.ones(4, 4)).byte())


def test_a_broken_picture_is_black_and_spares_the_others(tmp_path):
    images = torch.arange(12.0).reshape(1, 3, 2, 2).repeat(2, 1, 1, 1)
    images[0, 0, 0, 0] = torch.nan
    save_grid(tmp_path / "grid.png", images)
    grid = read(tmp_path / "grid.png")
    assert not grid[:, :, :4].any() and grid[:, :, 4:].max() == 255


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 1, 2, 2), (3, 2, 2)])
def test_what_is_no_grid(tmp_path, shape):
    with pytest.raises(ValueError, match="a grid takes images"):
        save_grid(tmp_path / "grid.png", torch.zeros(shape))
    assert not list(tmp_path.iterdir())


def test_clip_std():
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = 100
    clipped = clip_std(images, 2.5)
    assert clipped.max() == pytest.approx(float(images.mean() + 2.5 * images.std()))
    inside = (images - images.mean()).abs() < 2.5 * images.std()
    assert torch.equal(clipped[inside], images[inside])


def test_to_uint8_undoes_the_normalisation():
    pictures = torch.randint(0, 256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    mean, std = (0.4814, 0.4578, 0.4082), (0.2686, 0.2613, 0.2757)
    normal = (pictures / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(to_uint8(normal, mean, std), pictures.byte())
    assert torch.equal(to_uint8(normal[0], mean, std), pictures[0].byte())
    assert to_uint8(torch.tensor([-1.0, 0, 0.5, 1, 9]).view(1, 1, 5)).flatten().tolist() == [0, 0, 128, 255, 255]


def test_png_bytes_round_trip():
    picture = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    png = png_bytes(picture)
    assert torch.equal(read(io.BytesIO(png)), picture)
    assert png == png_bytes(picture.clone())
    with pytest.raises(ValueError, match="see to_uint8"):
        png_bytes(picture.float())


def test_fit_draws_back_what_goes_beyond_and_leaves_the_rest():
    """Two pictures: one from −1 to 3, whose middle 1 becomes half grey; one inside [0, 1], which stays."""
    wild, tame = torch.linspace(-1, 3, 3 * 100 * 100), torch.linspace(0.2, 0.9, 3 * 100 * 100)
    images = torch.stack([wild, tame]).view(2, 3, 100, 100)
    fitted, plain = to_uint8(images, fit=True), to_uint8(images)
    assert torch.equal(fitted[1], plain[1])
    values = fitted[0].flatten()
    assert int(values[15000]) in (127, 128) and int(values[0]) == 0 and int(values[-1]) == 255
    assert int((values == 255).sum()) < 0.02 * len(values) < int((plain[0] == 255).sum())


@pytest.mark.parametrize("form", ["PPM", "EPS", "PCX"])
def test_formats_of_no_data_set_are_not_opened(tmp_path, form):
    """Whatever a file's name ends in; PIL starts another program for some."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x", form)
    (tmp_path / "x").rename(tmp_path / "x.png")
    for source in (tmp_path / "x.png", (tmp_path / "x.png").read_bytes()):
        with pytest.raises(UnidentifiedImageError):
            open_image(source)
