"""Names to builders, and the error that tells you what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from utils.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


class Registry:
    """Builders by name: `@registry("name", "alias")` adds one, `registry[name]` finds it or raises UserError."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.builders: dict[str, Callable[..., Any]] = {}

    def __call__(self, *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def add(builder: Callable[..., Any]) -> Callable[..., Any]:
            self.builders.update(dict.fromkeys(names, builder))
            return builder

        return add

    def __contains__(self, name: str) -> bool:
        return name in self.builders

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self.builders:
            raise UserError(
                f"unknown {self.what} '{name}'{nearest(name, self.builders)}; known: {', '.join(self.names())}"
            )
        return self.builders[name]

    def names(self) -> list[str]:
        return sorted(self.builders)
