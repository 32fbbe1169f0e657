"""Labels of patches against figures worked out apart: by areas, by majority, and from a learned map."""

from collections import Counter

import pytest
import torch

from methods.poster_labels import LABEL_SHAPES, fixed_labels, map_grid, map_labels, map_shape, start_map
from tests.methods.posters import PUBLISHED, laid, published, toy
from utils.errors import UserError


def row(classes: int, **shares: float):
    """A row of probabilities, such as c0=.8, c1=.2."""
    values = torch.zeros(classes)
    for name, share in shares.items():
        values[int(name[1:])] = share
    return values


class TestFixed:
    @pytest.mark.parametrize(
        "patch, shares",
        [
            (0, row(10, c0=0.8366, c1=0.0523, c5=0.1046, c6=0.0065)),
            (7, row(10, c0=0.5098, c1=0.2124, c5=0.1961, c6=0.0817)),
            (14, row(10, c0=0.2745, c1=0.3088, c5=0.1961, c6=0.2206)),
            (95, row(10, c3=0.0065, c4=0.1046, c8=0.0523, c9=0.8366)),
        ],
    )
    def test_shares_of_the_published_cifar10(self, patch, shares):
        torch.testing.assert_close(fixed_labels(published("CIFAR10"), "area")[patch], shares, atol=5e-5, rtol=0)

    def test_all_shares_of_the_published_cifar10(self):
        shares = fixed_labels(published("CIFAR10"), "area")
        assert shares.dtype == torch.float32 and shares.shape == (96, 10)
        sums = torch.tensor([7.059, 11.294, 11.102, 11.487, 7.059] * 2)
        torch.testing.assert_close(shares.sum(0), sums, atol=5e-4, rtol=0)
        torch.testing.assert_close(shares.sum(1), torch.ones(96))
        top = shares.max(1).values
        assert float(top.mean()) == pytest.approx(0.539, abs=5e-4) and float(top.min()) == pytest.approx(
            0.309, abs=5e-4
        )

    def test_the_majority_of_the_published_cifar10(self):
        labels = fixed_labels(published("CIFAR10"), "majority")
        assert labels.dtype == torch.float32 and (labels.max(1).values == 1).all()  # exactly
        assert labels.sum(0).tolist() == [6, 12, 12, 12, 6] * 2
        columns = labels.argmax(1).view(16, 6)
        across = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
        assert columns.tolist() == [[label] * 3 + [label + 5] * 3 for label in across]

    @pytest.mark.parametrize(
        "side, patch, shares",
        [
            (6, 0, (4 / 9, 2 / 9, 2 / 9, 1 / 9)),
            (6, 1, (1 / 3, 1 / 6, 1 / 3, 1 / 6)),
            (6, 4, (1 / 4,) * 4),
            (7, 0, (0.64, 0.16, 0.16, 0.04)),
            (7, 1, (0.32, 0.08, 0.48, 0.12)),
            (7, 4, (0.16, 0.24, 0.24, 0.36)),
            (8, 1, (0.5, 0, 0.5, 0)),
            (8, 4, (1 / 4,) * 4),
        ],
    )
    def test_shares_by_hand(self, side, patch, shares):
        torch.testing.assert_close(fixed_labels(toy(side), "area")[patch], torch.tensor(shares), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        "side, patch, known",
        [
            (6, 0, (0.999323, 0.000335, 0.000335, 0.000006)),
            (6, 1, (0.498764, 0.001236, 0.498764, 0.001236)),
            (7, 1, (0.017983, 0.000045, 0.981851, 0.000121)),
        ],
    )
    def test_majority_is_a_softmax_of_pixels(self, side, patch, known):
        """Which shows only where patches have few."""
        torch.testing.assert_close(fixed_labels(toy(side), "majority")[patch], torch.tensor(known), atol=1e-6, rtol=0)

    def test_ties_are_split_evenly(self):
        labels = fixed_labels(laid(87, 35, 16, 6, 5, 2, 32), "majority")
        torch.testing.assert_close(labels.sum(1), torch.ones(96))
        split = labels[labels.max(1).values < 1]
        assert len(split) and all(sorted(row)[-2:] == [0.5, 0.5] for row in split.tolist())

    def test_labels_follow_the_order_of_classes(self):
        order = [[3, 1, 4, 0, 9], [2, 6, 5, 8, 7]]
        for mode in ("area", "majority"):
            plain = fixed_labels(published("CIFAR10"), mode)
            moved = fixed_labels(laid(*PUBLISHED["CIFAR10"], order=order), mode)
            assert torch.equal(moved[:, torch.tensor(order).flatten()], plain)

    @pytest.mark.parametrize("mode", ["area", "majority"])
    def test_patches_outside_all_areas(self, mode):
        """Areas of 2 x 2 in the corners of 12 x 12: only the corners of the 3 x 3 patches touch one."""
        layout = laid(12, 12, 3, 3, 2, 2, 4, class_area_width=2, class_area_height=2)
        says = (
            "5 of 9 patches lie outside all class areas .*; enlarge --class_area_width .* learn labels with --train_y"
        )
        with pytest.raises(UserError, match=says):
            fixed_labels(layout, mode)


class TestShape:
    @pytest.mark.parametrize(
        "name, exact, reference",
        [
            ("CIFAR10", (2, 5), (1, 6)),
            ("CIFAR100", (10, 10), (10, 9)),
            ("CUB200", (10, 20), (9, 21)),
            ("Tiny", (10, 20), (10, 19)),
        ],
    )
    def test_of_the_published_posters(self, name, exact, reference):
        layout = published(name)
        assert map_shape(layout, layout.classes, "exact") == exact
        assert map_shape(layout, layout.classes, "reference") == reference

    def test_the_released_rule_hangs_on_the_last_bit(self):
        square = {side: laid(side, side, 20, 20, 10, 10, 32) for side in range(100, 321)}
        shapes = {side: map_shape(layout, 100, "reference") for side, layout in square.items()}
        assert Counter(shapes.values()) == {(10, 10): 175, (10, 9): 19, (11, 11): 27}
        assert [shapes[side] for side in (102, 107, 202)] == [(10, 9), (11, 11), (10, 10)]
        assert {map_shape(layout, 100, "exact") for layout in square.values()} == {(10, 10)}

    @pytest.mark.parametrize("ipc", [1, 2, 5, 10])
    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_the_exact_rule_fits_in_and_has_a_cell_for_each_class(self, name, ipc):
        layout = published(name)
        (rows, columns), budget = map_shape(layout, layout.classes * ipc, "exact"), layout.classes * ipc
        assert rows >= layout.order.shape[0] and columns >= layout.order.shape[1]
        assert 0.8 * budget <= rows * columns <= budget

    def test_the_least_waste_is_taken(self):
        """f = √(100 / 9180): 6.26 rows of 15.97 columns; of 6 x 15, 6 x 16, 7 x 15 and 7 x 16 only two fit."""
        assert map_shape(published("CIFAR10"), 100, "exact") == (6, 16)

    def test_the_last_bit_decides_nothing(self):
        """99 cells on 100 : 99 are 10 rows of 9.9 columns at any size; 11 rows fit better, but are no rounding."""
        shapes = {map_shape(laid(99 * k, 100 * k, 9, 9, 3, 3, 16 * k), 99, "exact") for k in range(1, 60)}
        assert shapes == {(10, 9)}

    def test_the_class_grid_where_no_rounding_has_a_cell_for_each(self):
        """10 columns of one row on a square: roundings of √10 would drop most of them."""
        layout = laid(40, 40, 5, 5, 10, 1, 8)
        assert map_shape(layout, 10, "exact") == (1, 10)


def start(name: str, rule: str):
    """A published layout, the map that it starts with, and its grid."""
    layout = published(name)
    shape = map_shape(layout, layout.classes, rule)
    return layout, start_map(layout, shape), map_grid(layout, shape)


class TestMap:
    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_every_class_starts_with_a_label(self, name):
        layout, label_map, grid = start(name, "exact")
        assert torch.equal(label_map.sum((1, 2)), torch.ones(layout.classes))
        assert torch.equal(label_map.argmax(0), layout.order) and torch.equal(label_map.sum(0), torch.ones(grid.canvas))
        labels = map_labels(label_map, grid)
        assert (labels.max(1).values == 1).all() and (labels.sum(0) >= 4).all()

    @pytest.mark.parametrize(
        "name, without",
        [
            ("CIFAR100", range(4, 100, 10)),  # a column of the class grid
            ("CUB200", range(80, 100)),  # a row of it
            ("Tiny", range(10, 200, 20)),
        ],
    )
    def test_the_released_rule_leaves_classes_without_a_label(self, name, without):
        _, label_map, grid = start(name, "reference")
        empty = (label_map.sum((1, 2)) == 0).nonzero()[:, 0].tolist()
        assert empty == list(without)
        assert (map_labels(label_map, grid).sum(0) == 0).nonzero()[:, 0].tolist() == empty

    @pytest.mark.parametrize("name, least, most", [("CIFAR100", 4, 6), ("Tiny", 4, 6), ("CUB200", 4, 12)])
    def test_patches_share_cells(self, name, least, most):
        _, _, grid = start(name, "reference")
        shared = Counter(map(tuple, grid.boxes().tolist()))
        assert grid.cell == (1, 1) and len(shared) == grid.canvas[0] * grid.canvas[1]
        assert (min(shared.values()), max(shared.values())) == (least, most)

    def test_bands(self):
        """Edges are rounded half to even: 0 2 5 of 5, and 0 2 3 5 of 5 for three."""
        layout = laid(9, 6, 4, 2, 3, 2, 4, order=[[2, 0, 1], [5, 3, 4]])
        assert start_map(layout, (5, 5)).argmax(0).tolist() == [[2, 2, 0, 1, 1]] * 2 + [[5, 5, 3, 4, 4]] * 3

    @pytest.mark.parametrize("rule", LABEL_SHAPES)
    def test_labels_are_sums_over_crops(self, rule):
        """A map of 10 cells a class: a patch has a crop of several."""
        layout = published("CIFAR10")
        shape = map_shape(layout, 100, rule)
        label_map, grid = torch.rand(10, *shape), map_grid(layout, shape)
        down, across = int(shape[0] * 32 / 60), int(shape[1] * 32 / 153)
        assert grid.cell == (down, across) == (3, 3)
        tops, lefts = (
            torch.linspace(0, a - 3, n, dtype=torch.float64).round().int().tolist()
            for a, n in zip(shape, (6, 16), strict=True)
        )
        slow = torch.stack([label_map[:, t : t + 3, left : left + 3].sum((1, 2)) for left in lefts for t in tops])
        torch.testing.assert_close(map_labels(label_map, grid), slow / slow.sum(1, keepdim=True))

    def test_gradient(self):
        """Against finite differences: patches share cells, one class has no score, sums are not 1."""
        grid = map_grid(toy(), (3, 3))
        assert grid.cell == (2, 2)
        label_map = torch.rand(4, 3, 3, dtype=torch.float64) + 0.5
        label_map[2] = 0
        assert torch.autograd.gradcheck(lambda value: map_labels(value, grid), label_map.requires_grad_())

    def test_the_scale_of_a_cell_does_not_matter(self):
        _, label_map, grid = start("CIFAR10", "exact")
        label_map = label_map + torch.rand(label_map.shape)
        torch.testing.assert_close(map_labels(label_map * 7, grid), map_labels(label_map, grid))

    def test_cells_without_a_score(self):
        """The released code divides 0 by 0 there."""
        _, label_map, grid = start("CIFAR10", "exact")
        label_map[:, 0, 0] = 0
        label_map.requires_grad_()
        labels = map_labels(label_map, grid)
        assert labels[0].tolist() == [0] * 10 and torch.equal(labels.sum(1).bool(), labels.detach().any(1))
        assert int((labels.sum(1) == 0).sum()) == 6  # those that share the cell
        labels.square().sum().backward()
        assert torch.isfinite(label_map.grad).all()
