"""JSON and YAML texts that are meant to harm, or harm unmeant: one line each."""

import pytest

from utils.errors import UserError
from utils.files import read_json
from utils.parsing import Malformed, parse_json, parse_yaml

LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "the name 'a' twice"),
        ('{"count": NaN}', "the number NaN"),
        ('{"count": [-Infinity]}', "the number -Infinity"),
        ('{"count": 1e999}', "the number 1e999"),
        ('{"count": ' + "9" * 5000 + "}", "a number of too many digits"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"half": ', "Expecting value"),
        ("", "Expecting value"),
    ],
    ids=lambda text: text[:30],
)
def test_json(tmp_path, text, why):
    with pytest.raises(Malformed) as caught:
        parse_json(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"^manifest .*x\.json is not valid JSON"):
        read_json(tmp_path / "x.json", "manifest")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "stands for more than 1000000 values"),
        (LAUGHS + "<<: *a9", "stands for more than"),
        ("a: &a [*a]", "holds itself"),
        ("&a {b: *a}", "holds itself"),
        ("a: 1\nb: {c: 1, c: 2}", "the name 'c' twice"),
        ("[" * 5000 + "]" * 5000, "nested too deep"),
        ("count: " + "9" * 5000, "a number of too many digits"),
        ("when: 2020-13-45", "month must be in 1..12"),
        ("x: !!python/object/apply:os.mkdir [owned]", "could not determine a constructor"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        ("? {a: 1}\n: 2", "unhashable"),
        ("a: [1,", "expected"),
        ("a: 1\n--- \nb: 2", "expected a single document"),
        ("a: *b", "undefined alias"),
        ("a: \0", "special characters"),
    ],
    ids=lambda text: text[:30],
)
def test_yaml(tmp_path, text, why, refused):
    with pytest.raises(Malformed) as caught:
        parse_yaml(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "x.yaml").write_text(text)
    assert "x.yaml is not valid YAML" in refused("distill", "--config", tmp_path / "x.yaml")


def test_what_is_sound_is_read():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\nd: ~") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
        "d": None,
    }
    assert parse_yaml("# nothing") is None
    assert parse_json('{"a": [1, 2.5, null, "ü"], "b": {"a": -1e-9}}') == {"a": [1, 2.5, None, "ü"], "b": {"a": -1e-9}}
