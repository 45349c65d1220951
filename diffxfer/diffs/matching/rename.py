"""``--rename 'ROLE:REGEX=TEXT'``: rename a role's tensors where the built-in rules do not match."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.added import CHOICES
from diffxfer.diffs.matching.selection import compile_pattern
from diffxfer.errors import MatchError, OptionError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_OPTION = "--rename"
_FORM = "give ROLE:REGEX=TEXT, such as 'finetuned:^backbone\\.=model.'"


@dataclass(frozen=True, slots=True)
class Rename:
    r"""One substitution in the names of a role.

    Attributes:
        role: the role.
        regex: the pattern to replace, anywhere in a name.
        text: the replacement; ``\1`` is the first group.
    """

    role: str
    regex: re.Pattern[str]
    text: str

    def __str__(self) -> str:
        return f"{self.role}:{self.regex.pattern}={self.text}"


def parse_renames(options: Sequence[str], roles: Collection[str]) -> tuple[Rename, ...]:
    """Parse ``ROLE:REGEX=TEXT`` options; the last ``=`` ends the pattern.

    Args:
        options: the options, or a single one.
        roles: the roles of the command.

    Raises:
        OptionError: if one is not of that form.
    """
    options = [options] if isinstance(options, str) else options
    return tuple(_parse(option, roles) for option in options)


def _parse(option: str, roles: Collection[str]) -> Rename:
    role, colon, rest = option.partition(":")
    pattern, equals, text = rest.rpartition("=")
    if not colon or not equals or not pattern:
        raise OptionError(_OPTION, f"{option!r} is not of the form ROLE:REGEX=TEXT", _FORM)
    if role not in roles:
        problem = f"{role!r} in {option!r} is not a role of this command"
        raise OptionError(_OPTION, problem, f"use one of {', '.join(roles)}")
    regex = compile_pattern(_OPTION, pattern)
    try:
        re.sub(f"{regex.pattern}|", text, "")
    except (re.error, IndexError) as exc:
        problem = f"{text!r} is not a valid replacement for {pattern!r} ({exc})"
        raise OptionError(_OPTION, problem, "refer to a group of the pattern as \\1") from exc
    return Rename(role, regex, text)


def renamed(names: Collection[str], renames: Sequence[Rename], role: str) -> dict[str, str]:
    """The new name of every tensor of a role.

    Args:
        names: its tensors, without wrappers.
        renames: all renames; those of the role are applied in order.
        role: the role.

    Returns:
        The new name of each, in the same order.

    Raises:
        OptionError: if one of them matches nothing.
        MatchError: if two tensors get the same name, or one gets an empty name.
    """
    found = {name: name for name in names}
    for rename in renames:
        if rename.role != role:
            continue
        if not any(map(rename.regex.search, found.values())):
            example = next(iter(sorted(found.values())), "")
            problem = (
                f"{rename.regex.pattern!r} matches none of the {len(found)} tensors of {role},"
                f" which have names such as {example}"
            )
            raise OptionError(_OPTION, problem, "quote it for the shell, and correct it")
        found = {name: rename.regex.sub(rename.text, new) for name, new in found.items()}
        _refuse_collision(found, rename)
    return found


def _refuse_collision(found: Mapping[str, str], rename: Rename) -> None:
    first: dict[str, str] = {}
    for name, new in found.items():
        if not new or new in first:
            both = f"{first[new]} and {name}" if new in first else name
            problem = f"{_OPTION} {str(rename)!r} renames {both} to {new or 'an empty name'!r}"
            raise MatchError((), problem, "give a pattern that keeps their names distinct")
        first[new] = name


def names_command(added: str, renames: Sequence[Rename]) -> dict[str, str | list[str]]:
    """`--added` and `--rename` for the manifest, if they are not the defaults.

    Args:
        added: what to do with a head that fine-tuning added.
        renames: the renames.
    """
    found: dict[str, str | list[str]] = {}
    if added != CHOICES[0]:
        found["added"] = added
    if renames:
        found["rename"] = [str(rename) for rename in renames]
    return found
