"""Values by pattern of module names: ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
_PLAIN = re.compile(r"[\w.-]*")


class Patterns(Generic[T]):
    """Values by pattern; the first pattern that matches the end of a name counts, as in PEFT.

    An adapter may have a pattern for each of its thousands of modules, so plain names are looked
    up. A dot in a plain name stands for a dot.

    Args:
        values: the values by pattern.
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        self.values: Mapping[str, T] = dict(values)
        self._plain: dict[str, int] = {}
        self._regexes: list[tuple[int, str, re.Pattern[str]]] = []
        for place, pattern in enumerate(self.values):
            if _PLAIN.fullmatch(pattern):
                self._plain[pattern] = place
            else:
                self._regexes.append((place, pattern, _compiled(pattern)))

    def get(self, module: str, otherwise: T) -> T:
        """The value of a module.

        Args:
            module: its name in the model.
            otherwise: the value if no pattern matches.
        """
        best = len(self.values)
        found: str | None = None
        for part in _endings(module):
            place = self._plain.get(part, best)
            if place < best:
                best, found = place, part
        for place, pattern, regex in self._regexes:
            if place < best and regex.match(module):
                found = pattern
                break
        return otherwise if found is None else self.values[found]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as exc:
        raise ValueError(f"{pattern[:40]!r} is no regular expression ({exc})") from exc


def _endings(module: str) -> list[str]:
    """The name, and what follows each of its dots."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
