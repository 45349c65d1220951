"""Telling which tensors fit nowhere: grouped by what their names have in common, in one line."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import pattern
from diffxfer.errors import Culprits, MatchError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffxfer.diffs.matching.match import Problem

_NAMED_IN_MESSAGE = 3


def group_problems(problems: Iterable[Problem]) -> tuple[Culprits, ...]:
    """Put together what differs only in numbers: a layer's index, an expert's."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for problem in problems:
        key = (problem.role, pattern(problem.name), problem.found, problem.expected, problem.reason)
        groups[key].append(problem.name)
    return tuple(
        Culprits(role, shape_of_name, tuple(sorted(names)), found, expected, reason)
        for (role, shape_of_name, found, expected, reason), names in sorted(groups.items())
    )


def refusal(groups: tuple[Culprits, ...]) -> MatchError:
    """The error for tensors that fit nowhere, in one line.

    Args:
        groups: at least one.
    """
    total = sum(len(group.names) for group in groups)
    told = "; ".join(_told(group) for group in groups[:_NAMED_IN_MESSAGE])
    more = len(groups) - _NAMED_IN_MESSAGE
    if more > 0:
        told += f"; and {more} more kinds (all with --dry-run or --json)"
    noun = "tensor does not fit" if total == 1 else "tensors do not fit"
    return MatchError(groups, f"{total} {noun}: {told}", _remedy(groups))


def _told(group: Culprits) -> str:
    first = group.names[0]
    count = f" ({len(group.names)} such, as {group.pattern})" if len(group.names) > 1 else ""
    if group.found == "nothing":
        return f"{first}{count} {group.expected} is missing in {group.role}"
    return f"{first}{count} is {group.found} in {group.role} and {group.expected}"


def _remedy(groups: tuple[Culprits, ...]) -> str:
    names = [group.names[0] for group in groups]
    fused = any(".experts.gate_up_proj" in name for name in names)
    single = any(".experts.0." in name or ".experts.*." in pattern(name) for name in names)
    if fused and single:
        return (
            "one role stores its experts fused and another one by one:"
            " save all roles with the same version of transformers"
        )
    if all(group.found == "nothing" for group in groups):
        return "check that these belong together, or name them in --allow-missing 'REGEX'"
    return "check that these belong together, or leave them out with --exclude 'REGEX'"
