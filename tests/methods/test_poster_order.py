"""Where classes go on a poster: the placement, what is read of names, orders that come with the code, files, errors."""

import itertools
import json

import numpy as np
import pytest
import torch

from data.subsets import wordnet_names
from methods import poster_order
from methods.poster_order import (
    SHIPPED,
    NameEncoder,
    Order,
    OrderConfig,
    class_order,
    class_texts,
    cosine_distances,
    letter_vectors,
    load_order,
    place_classes,
    visits,
)
from networks.text import _learn_byte_pairs, _learn_word_pieces
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("own_folder")  # no test reaches a hub

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
# Tiny ImageNet's classes, counted among ImageNet's.
TINY = """
1 25 30 32 50 61 69 71 75 76 79 99 105 107 109 113 114 115 122 123 128 145 146 149 151 187 207 208 235 267 281 283 285
286 291 294 301 308 309 311 313 314 315 319 323 325 329 338 341 345 347 349 353 354 365 367 372 386 387 398 400 406 411
414 421 424 425 427 430 435 436 437 438 440 445 447 448 457 458 462 463 466 467 470 471 474 480 485 488 492 496 500 508
509 511 517 525 526 532 542 543 557 562 565 567 568 570 573 576 604 605 612 614 619 621 625 627 635 645 652 655 675 677
678 682 683 687 704 707 716 720 731 733 734 735 737 739 744 747 758 760 761 765 768 774 779 781 786 801 806 808 811 815
817 821 826 837 839 842 845 849 850 853 862 866 873 874 877 879 887 888 890 899 900 909 910 917 923 924 928 929 932 935
938 945 947 950 951 954 957 962 963 964 967 970 972 973 975 978 988
"""
NAMES = ["pine_tree", "tabby cat", "oak_tree", "wild cat", "red rose", "tree house"]


# The placement


def test_placement_of_points_on_a_line():
    points = torch.tensor([0.0, 1, 2, 4, 7, 11])
    grid = place_classes((points[:, None] - points).abs(), 2, 3)
    assert grid.tolist() == [[0, 2, 4], [1, 3, 5]] and grid.dtype == torch.long


@pytest.mark.parametrize(
    ("rows", "columns", "grid"), [(2, 3, [[0, 4, 5], [2, 1, 3]]), (3, 2, [[0, 4], [2, 1], [3, 5]])]
)
def test_placement_of_a_table(rows, columns, grid):
    lines = ["092746", "908351", "280637", "736092", "453908", "617280"]
    distances = torch.tensor([[float(digit) for digit in line] for line in lines])
    assert torch.equal(distances, distances.T)
    assert place_classes(distances, rows, columns).tolist() == grid


def test_cells_are_visited_by_anti_diagonals():
    assert visits(2, 3) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert visits(3, 3) == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (2, 1), (1, 2), (2, 2)]


def test_equals_go_to_the_earlier_class():
    assert place_classes(torch.zeros(6, 6), 2, 3).tolist() == [[0, 2, 4], [1, 3, 5]]


def slow_placement(distances, rows, columns):
    """The same with four neighbours, found in a table of what is placed."""
    placed, left = {}, list(range(rows * columns))
    for total in range(rows + columns - 1):
        for row in reversed(range(rows)):
            cell = row, total - row
            if 0 <= cell[1] < columns:
                around = [(cell[0] + a, cell[1] + b) for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))]
                near = [placed[other] for other in around if other in placed]
                best = min(left, key=lambda number: sum(distances[number][other] for other in near))
                placed[cell] = best
                left.remove(best)
    return [[placed[row, column] for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (3, 4), (5, 2)])
def test_placement_against_a_slow_one(rows, columns):
    points = torch.randn(rows * columns, 3, generator=torch.Generator().manual_seed(rows), dtype=torch.double)
    distances = torch.cdist(points, points)
    grid = place_classes(distances, rows, columns)
    assert grid.tolist() == slow_placement(distances.tolist(), rows, columns)


# What is read of names


def test_texts():
    texts = class_texts("cifar10", CIFAR10)
    assert texts == [*CIFAR10[:8], "boat", "truck"]
    texts = class_texts("CIFAR100", CIFAR100.split())
    assert [texts[number] for number in (1, 39, 41, 47)] == [
        *("aquarium fish", "computer keyboard", "lawn mower", "maple tree"),
    ]
    assert class_texts("folder", ["ship", "keyboard", "Grey-Cat_2"]) == ["ship", "keyboard", "Grey-Cat 2"]
    assert class_texts("Tiny", ["n01443537", "n01629819"]) == ["goldfish", "European fire salamander"]


def test_letters():
    distances = cosine_distances(letter_vectors(["pine tree", "oak tree", "boat", "2"]))
    assert distances[0, 1] < 0.8 and distances[0, 2] == 1 and not distances.diagonal().any()
    assert torch.equal(distances, distances.T)
    assert (cosine_distances(letter_vectors(list("0123456789"))) + torch.eye(10) == 1).all(), "digits are equally far"
    with pytest.raises(UserError, match=r"cannot be compared .* use --order table"):
        letter_vectors(["", ""])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP text tower of 20 positions with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = _learn_byte_pairs([name.replace("_", " ") for name in NAMES], 300)
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(4)
    config = CLIPTextConfig(vocab_size=300, projection_dim=6, max_position_embeddings=20, **small, **ends)
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("bert")
    _learn_word_pieces([name.replace("_", " ") for name in NAMES], 200).save_pretrained(folder)
    torch.manual_seed(5)
    DistilBertModel(DistilBertConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(
        folder
    )
    return folder


def slow_order(vectors, rows, columns):
    """PoCO of vectors, each two compared on their own."""
    unit = [vector.double() / vector.double().norm() for vector in vectors]
    distances = [[0.0] * len(unit) for _ in unit]
    for a, b in itertools.permutations(range(len(unit)), 2):
        distances[a][b] = 1 - float((unit[a] * unit[b]).sum())
    return slow_placement(distances, rows, columns)


@torch.no_grad()
def test_clip_reads_all_positions(clip, tmp_path):
    from transformers import AutoTokenizer, CLIPTextModel

    net, tokenizer = CLIPTextModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    texts = class_texts("folder", NAMES)
    slow = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        ids += [tokenizer.pad_token_id] * (20 - len(ids))
        slow.append(net(input_ids=torch.tensor([ids])).last_hidden_state[0].flatten())
    vectors = NameEncoder(str(clip)).encode(texts)
    assert vectors.shape == (6, 20 * 16) and np.allclose(vectors, torch.stack(slow).numpy(), atol=1e-5)
    order = class_order(OrderConfig("text", str(clip)), "folder", NAMES, 2, 3, tmp_path)
    assert order.grid.tolist() == slow_order(slow, 2, 3) and order.source == "computed" and order.encoder == str(clip)


@torch.no_grad()
def test_other_encoders_are_averaged_over_tokens(bert, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    net, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    slow = []
    for text in class_texts("folder", NAMES):
        tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        slow.append(net(**tokens).last_hidden_state[0].mean(0))
    order = class_order(OrderConfig("text", str(bert)), "folder", NAMES, 3, 2, tmp_path)
    assert order.grid.tolist() == slow_order(slow, 3, 2)


# Which order


def test_orders_that_come_with_the_code():
    orders = json.loads(SHIPPED.read_text())
    shapes = {"CIFAR10 2x5": (2, 5), "CIFAR100 10x10": (10, 10), "CUB200 10x20": (10, 20), "Tiny 10x20": (10, 20)}
    assert set(orders) == set(shapes)
    for name, (rows, columns) in shapes.items():
        grid = torch.tensor(orders[name]["grid"])
        assert grid.shape == (rows, columns) and orders[name]["classes"] == rows * columns
        assert grid.flatten().sort().values.tolist() == list(range(rows * columns)) and grid[0, 0] == 0
    assert SHIPPED.stat().st_size < 4000 and len(SHIPPED.read_text().splitlines()) == 2 + len(shapes)


@pytest.fixture
def unread(monkeypatch):
    """Reading a name fails the test."""
    monkeypatch.setattr(NameEncoder, "encode", lambda *_, **__: pytest.fail("an encoder was loaded"))
    monkeypatch.setattr(poster_order, "letter_vectors", lambda _: pytest.fail("letters were compared"))


@pytest.mark.usefixtures("unread")
def test_auto_takes_what_comes_with_the_code(tmp_path):
    order = class_order(OrderConfig(), "cifar10", CIFAR10, 2, 5, tmp_path)
    assert order.grid.tolist() == [[0, 1, 5, 3, 6], [9, 8, 7, 2, 4]]
    assert (order.encoder, order.source) == ("all-MiniLM-L6-v2", "shipped")
    assert order.lines(CIFAR10) == [
        "airplane  automobile  dog    cat   frog",
        "truck     ship        horse  bird  deer",
    ]
    assert class_order(OrderConfig(), "CIFAR100", CIFAR100.split(), 10, 10, tmp_path).source == "shipped"
    wnids, names = ([table[int(number)] for number in TINY.split()] for table in wordnet_names())
    for classes in (wnids, names):
        assert class_order(OrderConfig(), "tiny", classes, 10, 20, tmp_path).source == "shipped"
    assert not (tmp_path / "orders").exists()


def test_auto_computes_for_other_names_and_grids(tmp_path, capsys):
    """And where no weights are to be had, it says so and compares letters."""
    for classes, rows in ((CIFAR10, 5), (CIFAR10[::-1], 2)):
        order = class_order(OrderConfig(), "cifar10", classes, rows, 10 // rows, tmp_path)
        assert (order.encoder, order.source) == ("words", "computed") and order.grid.shape == (rows, 10 // rows)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("note: openai/clip-vit-base-patch32 is not to be had")
    words = class_order(OrderConfig("auto", "words"), "cifar10", CIFAR10, 2, 5, tmp_path)
    assert (words.encoder, words.source) == ("words", "computed") and capsys.readouterr().out == ""


@pytest.mark.usefixtures("unread")
def test_table(tmp_path):
    order = class_order(OrderConfig("table"), "cifar10", CIFAR10, 5, 2, tmp_path)
    assert order.grid.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and order.encoder == "table"


def test_computed_orders_are_kept(clip, tmp_path):
    def make(encoder="words", names=NAMES, rows=2):
        return class_order(OrderConfig("text", encoder), "folder", names, rows, len(names) // rows, tmp_path)

    first = make()
    assert first.source == "computed" and len(list((tmp_path / "orders").iterdir())) == 1
    assert make().source == "cached" and torch.equal(make().grid, first.grid) and make().encoder == "words"
    assert {make(rows=3).source, make(names=NAMES[::-1]).source, make(str(clip)).source} == {"computed"}
    assert make(str(clip)).source == "cached"
    for path in (tmp_path / "orders").iterdir():
        path.write_text('{"grid": [[0, 0, 1], [2, 3, 4]]}')
    again = make()
    assert again.source == "computed" and torch.equal(again.grid, first.grid), "a damaged file is computed again"


def test_a_hub_encoder_is_loaded_once(tmp_path, monkeypatch):
    def encode(self, captions, quiet=False):
        return np.random.default_rng(0).normal(size=(len(captions), 4))

    with monkeypatch.context() as patch:
        patch.setattr(NameEncoder, "encode", encode)
        first = class_order(OrderConfig("text"), "folder", NAMES, 2, 3, tmp_path)
    again = class_order(OrderConfig("auto"), "folder", NAMES, 2, 3, tmp_path)  # offline, and no note
    assert again.source == "cached" and torch.equal(again.grid, first.grid)
    assert first.encoder == again.encoder == "openai/clip-vit-base-patch32"


# Files


def test_order_files(tmp_path):
    order = Order(torch.tensor([[2, 0, 1], [5, 4, 3]]), "somebody", "computed")
    order.save(tmp_path / "order.json", NAMES)
    state = json.loads((tmp_path / "order.json").read_text())
    assert len(state.pop("digest")) == 64
    assert state == {
        "format": 1,
        "encoder": "somebody",
        "rows": 2,
        "columns": 3,
        "grid": [[2, 0, 1], [5, 4, 3]],
        "names": [["oak_tree", "pine_tree", "tabby cat"], ["tree house", "red rose", "wild cat"]],
    }
    assert "  [2, 0, 1],\n  [5, 4, 3]\n" in (tmp_path / "order.json").read_text(), "a line a row"
    cfg = OrderConfig(str(tmp_path / "order.json"))
    for found in (load_order(cfg.order, NAMES), class_order(cfg, "folder", NAMES, 2, 3, tmp_path)):
        assert torch.equal(found.grid, order.grid)
        assert (found.encoder, found.source) == ("somebody", str(tmp_path / "order.json"))
    (tmp_path / "mine.json").write_text('{"grid": [[1, 0]]}')
    assert load_order(tmp_path / "mine.json", ["a", "b"]).grid.tolist() == [[1, 0]]


def test_an_order_is_changed_by_hand_on_purpose(tmp_path):
    path = tmp_path / "order.json"
    Order(torch.tensor([[2, 0, 1], [5, 4, 3]]), "somebody", "computed").save(path, NAMES)
    path.write_text(path.read_text().replace("somebody", "somebodi"))
    with pytest.raises(UserError, match=r"order\.json is not as it was written; restore it, or drop the line of its"):
        load_order(path, NAMES)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"digest"' not in line))
    assert load_order(path, NAMES).encoder == "somebodi"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[0, 1], [2, 3]]", "has no 'grid' of rows of class numbers, each of 0 to 3 once"),
        ('{"grid": [[0, 1], [2, 4]]}', "has no 'grid'"),
        ('{"grid": [[0, 1], [2, 2]]}', "has no 'grid'"),
        ('{"grid": [[0, 1], [2, true]]}', "has no 'grid'"),
        ('{"grid": [[0, 1, 2], [3]]}', "has no 'grid'"),
        ('{"grid": [0, 1, 2, 3]}', "has no 'grid'"),
        ('{"grid": []}', "has no 'grid'"),
        ('{"grid": [[0, 1], [2, 3]], "names": [["a", "b"], ["c", "e"]]}', "has other names than the data set"),
        ('{"grid": [[0, 1, 2, 3]]}', r"is 4 x 1 \(width x height\), the poster's class grid 2 x 2"),
        ("{", "is not valid JSON"),
    ],
)
def test_files_that_do_not_fit(tmp_path, text, says):
    (tmp_path / "order.json").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        class_order(OrderConfig(str(tmp_path / "order.json")), "folder", list("abcd"), 2, 2, tmp_path)
    assert "\n" not in str(caught.value)


# Mistakes


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (OrderConfig("txet"), r"there is no file txet \(did you mean 'text'\?\)"),
        (OrderConfig("text"), "openai/clip-vit-base-patch32 are not here .* use --order_encoder words"),
        (OrderConfig("auto", "some/encoder"), "some/encoder are not here .* use --order_encoder words"),
    ],
)
def test_errors_are_one_line(tmp_path, cfg, says):
    with pytest.raises(UserError, match=says) as caught:
        class_order(cfg, "folder", NAMES, 2, 3, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", ["auto", "table", "text"])
def test_a_grid_of_another_size(tmp_path, order):
    with pytest.raises(UserError, match=r"5 x 3 \(width x height\) has 15 places for 10 classes"):
        class_order(OrderConfig(order), "cifar10", CIFAR10, 3, 5, tmp_path)


def test_the_encoder_is_idle_where_nothing_is_read():
    assert OrderConfig("text").idle() == OrderConfig().idle() == {}
    assert set(OrderConfig("table").idle()) == {"order_encoder"}
