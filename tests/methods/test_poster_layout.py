"""Where patches and class areas are on a poster, and the way there and back: against slow slicing and known figures."""

from itertools import pairwise

import pytest
import torch

from methods.poster_layout import Grid, GridConfig, plan
from tests.methods.posters import PUBLISHED, laid, published, toy
from utils.errors import UserError

# Uneven in all that can be: overlaps across, hardly any down, no square anywhere.
UNEVEN = Grid(canvas=(11, 9), cell=(4, 3), count=(3, 5))


def sliced(grid: Grid, canvas):
    """The cells of a canvas, one slice each, down a column first."""
    (height, width), cells = grid.cell, []
    for left in grid.lefts:
        for top in grid.tops:
            cells.append(canvas[:, top : top + height, left : left + width])
    return torch.stack(cells)


def coverage(grid: Grid):
    """(H, W): in how many cells each pixel is."""
    counts = torch.zeros(grid.canvas)
    for top, left, bottom, right in grid.boxes().tolist():
        counts[top:bottom, left:right] += 1
    return counts


class TestPlaces:
    def test_of_the_published_cifar10(self):
        patches, areas = published("CIFAR10").patches, published("CIFAR10").areas
        assert patches.lefts == [0, 8, 16, 24, 32, 40, 48, 56, 65, 73, 81, 89, 97, 105, 113, 121]
        assert patches.tops == [0, 6, 11, 17, 22, 28]
        assert areas.lefts == [0, 30, 60, 91, 121] and areas.tops == [0, 28]

    def test_of_the_published_cifar100(self):
        patches, areas = published("CIFAR100").patches, published("CIFAR100").areas
        known = [0, 14, 29, 43, 57, 71, 86, 100, 114, 128, 143, 157, 171, 185, 200, 214, 228, 242, 257, 271]
        assert patches.lefts == patches.tops == known
        assert areas.lefts == areas.tops == [0, 30, 60, 90, 120, 151, 181, 211, 241, 271]

    @pytest.mark.parametrize(
        "name, side, strides, last",
        [("CUB200", "lefts", {9, 10}, 578), ("Tiny", "lefts", {29, 30}, 1147), ("Tiny", "tops", {28, 29}, 544)],
    )
    def test_of_large_posters(self, name, side, strides, last):
        starts = getattr(published(name).patches, side)
        assert starts[0] == 0 and starts[-1] == last
        assert {after - before for before, after in pairwise(starts)} == strides

    def test_halves_go_to_the_even_neighbour(self):
        assert Grid((1, 5), (1, 2), (1, 7)).lefts == [0, 0, 1, 2, 2, 2, 3]

    def test_a_single_one_is_at_the_start(self):
        assert Grid((4, 100), (4, 32), (1, 1)).lefts == [0]

    def test_they_are_counted_down_a_column_first(self):
        boxes = published("CIFAR10").patches.boxes()
        assert boxes[[7, 14, 95]].tolist() == [[6, 8, 38, 40], [11, 16, 43, 48], [28, 121, 60, 153]]
        assert len(boxes) == len(published("CIFAR10").patches) == 96

    def test_owners_follow_the_order_of_classes(self):
        layout = laid(10, 7, 3, 2, 3, 2, 4, order=[[3, 1, 0], [2, 5, 4]])
        assert layout.owners().tolist() == [3, 2, 1, 5, 0, 4]
        corner = layout.counts()[0]  # the upper left patch is just the area of class 3
        assert corner[3] == corner.max() == 16


class TestCoverage:
    def test_of_the_published_cifar10(self):
        counts = coverage(published("CIFAR10").patches)
        assert float(counts.mean()) == pytest.approx(10.71, abs=0.005) and counts.max() == 24
        assert counts[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [1] * 4

    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_published_posters_have_no_holes(self, name):
        assert published(name).patches.uncovered() == 0

    @pytest.mark.parametrize("grid", [UNEVEN, *(Grid((13, 17), (4, 3), (a, b)) for a in (1, 2, 4) for b in (1, 3, 6))])
    def test_pixels_left_out(self, grid):
        assert grid.uncovered() == int((coverage(grid) == 0).sum())

    def test_the_released_defaults_leave_pixels_out(self):
        """475 x 210 with 16 x 6 patches, as the released code starts without flags."""
        says = (
            "8550 of the poster's 99750 pixels are in no patch, so nothing would train them; a poster of 475 x 210 "
            "takes at least --patch_num_x 15 --patch_num_y 7"
        )
        with pytest.raises(UserError) as error:
            laid(475, 210, 16, 6, 5, 2, 32)
        assert str(error.value) == says

    @pytest.mark.parametrize("side", [4, 5, 7])
    def test_the_advice_is_right_and_no_more_than_needed(self, side):
        for length in range(side, 6 * side):
            least = -(-length // side)
            laid(length, side, least, 1, 1, 1, side)
            for fewer in range(1, least):
                with pytest.raises(UserError, match=f"at least --patch_num_x {least} --patch_num_y 1$"):
                    laid(length, side, fewer, 1, 1, 1, side)


class TestCut:
    def test_is_slicing(self):
        canvas = torch.randn(2, *UNEVEN.canvas)
        assert torch.equal(UNEVEN.cut(canvas), sliced(UNEVEN, canvas))
        poster = torch.randn(3, 60, 153)
        patches = published("CIFAR10").patches
        assert patches.cut(poster).shape == (96, 3, 32, 32)
        assert torch.equal(patches.cut(poster), sliced(patches, poster))

    def test_gradient(self):
        """Each pixel gathers from all cells that it is in."""
        canvas = torch.randn(2, *UNEVEN.canvas, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(len(UNEVEN), 2, *UNEVEN.cell, dtype=torch.float64)
        (found,) = torch.autograd.grad((UNEVEN.cut(canvas) * weights).sum(), canvas)
        (slow,) = torch.autograd.grad((sliced(UNEVEN, canvas) * weights).sum(), canvas)
        torch.testing.assert_close(found, slow)
        (counts,) = torch.autograd.grad(UNEVEN.cut(canvas).sum(), canvas)
        assert torch.equal(counts, coverage(UNEVEN).double().expand(2, -1, -1))
        assert torch.autograd.gradcheck(lambda value: UNEVEN.cut(value) ** 2, canvas)

    def test_overlaps(self):
        patches, areas = toy().patches, Grid((6, 6), (3, 4), (2, 3))
        mine, theirs = (
            torch.stack([Grid((6, 6), (6, 6), (1, 1)).cut(one)[0, 0] for one in masks(grid)]).flatten(1)
            for grid in (patches, areas)
        )
        assert torch.equal(patches.overlaps(areas), (mine @ theirs.T).long())
        assert patches.overlaps(areas).shape == (9, 6)


def masks(grid: Grid):
    """(M, 1, H, W): 1 in one cell, 0 elsewhere."""
    found = torch.zeros(len(grid), 1, *grid.canvas)
    for mask, (top, left, bottom, right) in zip(found, grid.boxes().tolist(), strict=True):
        mask[:, top:bottom, left:right] = 1
    return found


def constant(grid: Grid, *values: float):
    """Cells (M, 1, h, w) of one value each."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, *grid.cell)


class TestBlend:
    @pytest.mark.parametrize(
        "length, values, known",
        [
            (6, (0.0, 1.0), [0, 0, 0, 1, 1, 1]),  # two pixels shared: a hard cut
            (10, (1.0, 2.0), [1, 1, 1, 1, 0, 0, 2, 2, 2, 2]),  # a gap stays 0
            (8, (1.0, 2.0), [1, 1, 1, 1, 2, 2, 2, 2]),
            (5, (2.0, 4.0), [2, 2, 3, 4, 4]),
            (6, (8.0, 16.0, 0.0), [8, 8, 12, 8, 0, 0]),  # the third fades into the first two as they are by then
        ],
    )
    def test_fade(self, length, values, known):
        """Across and, the same, down."""
        for flat, grid in (
            (lambda canvas: canvas[0, 0], Grid((4, length), (4, 4), (1, len(values)))),
            (lambda canvas: canvas[0, :, 0], Grid((length, 4), (4, 4), (len(values), 1))),
        ):
            canvas = grid.blend(constant(grid, *values))
            assert canvas.shape == (1, *grid.canvas)
            assert flat(canvas).tolist() == known
            assert torch.equal(canvas, flat(canvas).view(-1, 1 if grid.count[1] == 1 else length).expand_as(canvas))

    def test_both_ways_at_once(self):
        """Cells are counted down a column first; weights 1, ½, 0 in the middle, in both directions."""
        grid = Grid((3, 3), (2, 2), (2, 2))
        assert grid.blend(constant(grid, 0.0, 8.0, 16.0, 24.0))[0].tolist() == [[0, 0, 16], [0, 0, 16], [8, 8, 24]]
        grid = Grid((5, 5), (4, 4), (2, 2))
        assert grid.blend(constant(grid, 0.0, 8.0, 16.0, 24.0))[0, :, [0, 2, 4]].tolist() == [
            *[[0, 8, 16]] * 2,
            [4, 12, 20],
            *[[8, 16, 24]] * 2,
        ]

    @pytest.mark.parametrize("grid", [UNEVEN, toy().patches, published("CIFAR10").patches, published("CIFAR10").areas])
    def test_what_was_cut_comes_back(self, grid):
        canvas = torch.randn(3, *grid.canvas, dtype=torch.float64)
        torch.testing.assert_close(grid.blend(grid.cut(canvas)), canvas)

    def test_gaps_both_ways_are_zero(self):
        grid = Grid((13, 17), (4, 3), (2, 3))
        canvas = torch.rand(3, 13, 17) + 1
        torch.testing.assert_close(grid.blend(grid.cut(canvas)), canvas * (coverage(grid) > 0))

    @pytest.mark.parametrize("width, height, across, down", [(7, 9, 2, 3), (7, 20, 2, 6), (4, 20, 1, 6), (20, 7, 6, 2)])
    def test_tall_grids_keep_all_rows(self, width, height, across, down):
        """The released code joins as many rows as it joins columns, and loses the rest."""
        grid = Grid((height, width), (4, 4), (down, across))
        canvas = grid.blend(torch.ones(across * down, 3, 4, 4))
        assert canvas.shape == (3, height, width)
        torch.testing.assert_close(canvas, torch.ones(3, height, width))


class TestPlan:
    @pytest.mark.parametrize(
        "name, pixels, ipc",
        [
            ("CIFAR10", 9180, 0.8965),
            ("CIFAR100", 91809, 0.8966),
            ("CUB200", 184220, 0.8995),
            ("Tiny", 736288, 0.8988),
        ],
    )
    def test_budgets(self, name, pixels, ipc):
        layout = published(name)
        assert layout.pixels == pixels and layout.ipc == pytest.approx(ipc, abs=5e-5)
        assert layout.classes == layout.order.numel()

    @pytest.mark.parametrize("tenths, side", [*enumerate([175, 202, 226, 247, 267, 286, 303, 320], start=3)])
    def test_square_posters_use_their_budget(self, tenths, side):
        budgets = [laid(width, width, 20, 20, 10, 10, 32).ipc for width in (side, side + 1)]
        assert budgets[0] <= tenths / 10 < budgets[1]

    def test_areas_are_as_large_as_images_unless_told(self):
        assert laid(40, 40, 2, 2, 2, 2, 32).areas.cell == (32, 32)
        layout = laid(40, 40, 2, 2, 2, 2, 32, class_area_width=20, class_area_height=10)
        assert layout.areas.cell == (10, 20) and layout.patches.cell == (32, 32)  # height first

    @pytest.mark.parametrize(
        "options, says",
        [
            ({"poster_class_num_x": 3}, "--poster_class_num_x 3 times --poster_class_num_y 2 is 6, and .* 10 classes"),
            (
                {"poster_class_num_x": 2, "poster_class_num_y": 5},
                "order of classes has 2 rows of 5, not the 5 rows of 2 of --poster_class_num_y",
            ),
            (
                {"poster_width": 31},
                r"a patch of 32 x 32 pixels does not fit on a poster of 31 x 60 \(width x height\); enlarge "
                "--poster_width or --poster_height$",
            ),
            ({"poster_height": 31}, "a patch of 32 x 32 pixels does not fit on a poster of 153 x 31"),
            (
                {"class_area_width": 154},
                "a class area of 154 x 32 pixels does not fit .* lower --class_area_width or --class_area_height$",
            ),
            ({"class_area_height": 61}, "a class area of 32 x 61 pixels does not fit on a poster of 153 x 60"),
            ({"patch_num_x": 4}, "1500 of the poster's 9180 .* --patch_num_x 5 --patch_num_y 2$"),
        ],
    )
    def test_what_cannot_be(self, options, says):
        with pytest.raises(UserError, match=says):
            plan(GridConfig(**options), 32, torch.arange(10).view(2, 5))
