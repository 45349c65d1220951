"""Options whose value may be left out: typer has none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT = "default"
ADDRESS = re.compile(r"auto|local|ray://.+|[^/\s]+:[0-9]+")
"""The form of a cluster's address."""
_LIKE_ADDRESS = re.compile(rf"{ADDRESS.pattern}|[0-9]+(?:\.[0-9]+){{3}}")
"""Also an address without its port, so that the message is about the port."""

OPTIONAL: Mapping[str, tuple[re.Pattern[str], str]] = {
    "--pack": (re.compile(r"exact|int8|int4"), "exact"),
    "--ray": (_LIKE_ADDRESS, DEFAULT),
}
"""By option: the form of its values, and the value that is used if none follows it."""


def fill_in(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, with the values that were left out.

    What follows the option is its value only if it has the form of one; anything else is the next
    argument. ``--option=VALUE`` is never changed.

    Args:
        arguments: what the user typed after the command's name.
    """
    filled: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return [*filled, *arguments[index:]]
        form, value = OPTIONAL.get(argument, (None, ""))
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        left_out = form is not None and not form.fullmatch(following)
        filled.append(f"{argument}={value}" if left_out else argument)
    return filled
