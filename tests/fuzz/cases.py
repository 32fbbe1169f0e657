"""What the fuzzing tests share: how a property becomes a short test and a long one, what may come of a case, and the
values that make code stumble.

Cases are derandomized: the same ones are tried on every machine, until hypothesis or a property changes.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from utils.errors import run_main

SECONDS = 20  # for one case, which takes milliseconds: more is a hang
DECLARED: dict[str, int] = {}  # property → cases of its long form


class Hang(BaseException):
    """A case that does not end; no code of ours may catch it."""


def fuzz(long: int, short: int, **given_by: st.SearchStrategy) -> Callable:
    """A property as two tests: `short` cases, and the `long` ones that are marked slow; both count what they tried.

    The property's arguments are those of `given_by`, and `scratch`, a folder of the test's own, which cases share.
    """

    def wrap(judge: Callable[..., None]) -> Callable:
        DECLARED[f"{judge.__module__}.{judge.__name__}"] = long

        @pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.slow)], ids=["short", "long"])
        def test(tmp_path, monkeypatch, count: int) -> None:
            monkeypatch.chdir(tmp_path)
            tried = 0

            def case(**drawn: Any) -> None:
                nonlocal tried
                tried += 1
                with alarmed():
                    judge(scratch=tmp_path, **drawn)

            limits = settings(
                max_examples=count,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.explicit, Phase.generate, Phase.shrink),
            )
            limits(given(**given_by)(case))()
            print(f"{judge.__name__}: {tried} cases")
            assert tried >= count

        test.__doc__, test.__name__ = judge.__doc__, judge.__name__
        return test

    return wrap


@contextlib.contextmanager
def alarmed() -> Iterator[None]:
    """Hang where the block takes longer than SECONDS."""

    def ring(*_: object) -> None:
        raise Hang(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(main: Callable[[], Any], words: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run `main` as a script would; its exit code, 0, 1 or 2, and its one line of error, '' where it went well.

    Whatever else a script could show (a traceback, several lines, an exit without a word) fails the test. Both streams
    are UTF-8 as in a terminal, where standard output takes no lone surrogates.
    """
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how, write_through=True)
        for how in ("strict", "backslashreplace")
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        rc = run_main(lambda _: main(), words, "fuzz.py")
    return rc, one_line(rc, err.buffer.getvalue().decode(), "fuzz.py")


def one_line(rc: int, text: str, prog: str) -> str:
    """What is left of standard error without its `prog: error: `; it must be one printable line, of code 1 or 2."""
    if rc == 0:
        assert not text, text
        return ""
    begin = f"{prog}: error: "
    assert rc in (1, 2), (rc, text)
    assert text.startswith(begin) and text.endswith("\n") and len(text) > len(begin) + 1, text
    assert text[:-1].isprintable(), text
    assert len(text) < 4000, len(text)
    return text.removeprefix(begin).rstrip("\n")


# Any text, control characters and characters of several bytes among it, but none that no UTF-8 file can hold.
texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(
        ["", " ", "\0", "\t", "a\nb", "\r\n", "\x1b[2J", "\x85", "\u2028", "\ufeff", "é" * 5, "漢字", "🦊"]
    ),
    st.sampled_from(["..", "/", "../../etc/passwd", "%s", "{0}", "{label}", "$HOME", "~", "-", "--", "#", "a" * 3000]),
    st.sampled_from(["null", "true", "no", "nan", "inf", "-inf", "1e400", "0x10", "1_0", "١٢", "1e-2", "012"]),
)
whole = st.one_of(
    st.integers(-3, 12),
    st.integers(),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400]),
)
numbers = st.one_of(whole, st.floats(), st.sampled_from([float("nan"), float("inf"), -0.0, 1e308, 5e-324]))
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
trees = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=10
)


def changed(value: Any) -> st.SearchStrategy:
    """A JSON value with one thing changed somewhere: another value there, an entry gone, or one more."""
    if isinstance(value, dict) and value:
        keys = st.sampled_from(sorted(value, key=str))
        inside = keys.flatmap(lambda key: changed(value[key]).map(lambda new: value | {key: new}))
        gone = keys.map(lambda key: {name: part for name, part in value.items() if name != key})
        more = st.tuples(texts, trees).map(lambda pair: value | {pair[0]: pair[1]})
        return st.one_of(inside, inside, gone, more, trees)
    if isinstance(value, list) and value:
        places = st.integers(0, len(value) - 1)
        inside = places.flatmap(
            lambda place: changed(value[place]).map(lambda new: [*value[:place], new, *value[place + 1 :]])
        )
        gone = places.map(lambda place: value[:place] + value[place + 1 :])
        twice = places.map(lambda place: [*value, value[place]])
        return st.one_of(inside, inside, gone, twice, trees)
    return trees


def damaged(content: bytes) -> st.SearchStrategy:
    """Bytes that are cut short, have a stretch replaced, or a stretch twice."""
    places = st.tuples(st.integers(0, len(content)), st.integers(0, len(content))).map(sorted)
    some = st.binary(max_size=6) | st.sampled_from([b"", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\r\n", b"[" * 9])
    return st.one_of(
        st.just(content),
        places.map(lambda pair: content[: pair[0]]),
        st.tuples(places, some).map(lambda drawn: content[: drawn[0][0]] + drawn[1] + content[drawn[0][0] :]),
        st.tuples(places, some).map(lambda drawn: content[: drawn[0][0]] + drawn[1] + content[drawn[0][1] :]),
        places.map(lambda pair: content + content[pair[0] : pair[1]]),
    )


def json_files(value: Any) -> st.SearchStrategy:
    """The bytes of JSON files: of this value somewhat changed, of anything, deep ones, and damaged ones."""
    written = json.dumps(value).encode()
    some = st.one_of(changed(value), changed(value).flatmap(changed), trees).map(lambda tree: json.dumps(tree).encode())
    deep = st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"[1e999]", b"", b"\xef\xbb\xbf" + written]
    )
    return st.one_of(some, some, some, damaged(written), deep, st.binary(max_size=20))
