"""JSON that is read piece by piece."""

import json

import pytest

from utils import streams
from utils.errors import UserError
from utils.streams import json_lists

THINGS = {
    "n01": [[1.5, -2e-3], [], [[3]]],
    'a "quoted", [name]': ["text with ] } , and \\ and \n", "ü", ""],
    "none": [],
    "plain": [12345, None, True, {"x": [1]}],
}


@pytest.fixture(params=[1, 2, 3, 7, 1 << 20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(streams._Reader, "CHUNK", request.param)


def everything(path):
    return {key: list(items) for key, items in json_lists(path, "things")}


@pytest.mark.parametrize("way", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_it_is_what_json_reads(way, chunk, tmp_path):
    path = tmp_path / "things.json"
    path.write_text(json.dumps(THINGS, **way) + " \n", encoding="utf-8")
    assert everything(path) == THINGS
    assert list(everything(path)) == list(THINGS)


@pytest.mark.parametrize("text", ["{}", " { \n} ", "\ufeff{}"])
def test_nothing(text, chunk, tmp_path):
    (tmp_path / "none.json").write_text(text, encoding="utf-8")
    assert everything(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a"',
        '{"a": ',
        '{"a": [1, 2',
        '{"a": [1, 2]',
        '{"a": [1, 2],',
        '{"a": [1, 2],}',
        '{"a": [1,]}',
        '{"a": [1 2]}',
        '{"a": ["text',
        '{"a": 3}',
        '{"a": {"b": []}}',
        "{3: []}",
        '{"a": [1]} and more',
        '{"a": [' + "[" * 100_000,
    ],
)
def test_it_is_cut_or_something_else(text, chunk, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"things .*bad\.json is cut short or not JSON of the form") as error:
        everything(tmp_path / "bad.json")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'{"a": ["\xff\xfe"]}')
    with pytest.raises(UserError, match="cut short or not JSON"):
        everything(tmp_path / "bad.json")


def test_no_more_is_held_than_an_item_needs(tmp_path, monkeypatch):
    """A file of a thousand chunks: what is at hand does not grow, and the first items come before the end is read."""
    monkeypatch.setattr(streams._Reader, "CHUNK", 1000)
    row = list(range(150))
    path = tmp_path / "long.json"
    path.write_text(json.dumps({f"n{number}": [row] * 10 for number in range(200)})[:-1] + "broken")
    held = 0
    more = streams._Reader._more

    def watched(self):
        nonlocal held
        going = more(self)
        held = max(held, len(self.text))
        return going

    monkeypatch.setattr(streams._Reader, "_more", watched)
    found = []
    with pytest.raises(UserError):
        for key, items in json_lists(path, "things"):
            found.append(key)
            assert list(items) == [row] * 10
    assert len(found) == 200 and held < 4000 < path.stat().st_size / 100


def test_an_item_without_an_end_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams._Reader, "CHUNK", 100)
    monkeypatch.setattr(streams._Reader, "LIMIT", 1000)
    (tmp_path / "long.json").write_text('{"a": ["' + "x" * 100_000)
    with pytest.raises(UserError, match="cut short"):
        everything(tmp_path / "long.json")


def test_garbage_within_an_item_is_told_before_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams._Reader, "CHUNK", 100)
    (tmp_path / "bad.json").write_text('{"a": [[1, oops, ' + "1, " * 100_000 + "1]]}")
    reads = []
    more = streams._Reader._more
    monkeypatch.setattr(streams._Reader, "_more", lambda self: reads.append(0) or more(self))
    with pytest.raises(UserError, match="cut short"):
        everything(tmp_path / "bad.json")
    assert len(reads) < 4
