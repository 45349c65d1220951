"""The error for tensors that cannot be matched: one line, names grouped by pattern."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import is_head_name, pattern
from diffxfer.diffs.matching.suggest import suggest_renames
from diffxfer.errors import Culprits, MatchError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffxfer.diffs.matching.match import Problem

_NAMED_IN_MESSAGE = 3


def group_problems(problems: Iterable[Problem]) -> tuple[Culprits, ...]:
    """Group problems whose names differ only in numbers, such as a layer's or expert's index."""
    groups: dict[Culprits, list[str]] = defaultdict(list)
    for problem in problems:
        key = Culprits(
            *(problem.role, pattern(problem.name), (), problem.found, problem.expected),
            *(problem.reason, problem.holders, problem.addable),
        )
        groups[key].append(problem.name)
    ordered = sorted(groups.items(), key=lambda item: (item[0].role, item[0].pattern, repr(item)))
    return tuple(replace(group, names=tuple(sorted(names))) for group, names in ordered)


def refusal(groups: tuple[Culprits, ...]) -> MatchError:
    """The error for tensors that cannot be matched, in one line.

    Args:
        groups: the tensors, grouped; at least one group.
    """
    total = sum(len(group.names) for group in groups)
    told = "; ".join(_told(group) for group in _telling(groups)[:_NAMED_IN_MESSAGE])
    more = len(groups) - _NAMED_IN_MESSAGE
    if more > 0:
        told += f"; and {more} more groups (--json lists them)"
    noun = "tensor does not fit" if total == 1 else "tensors do not fit"
    return MatchError(groups, f"{total} {noun}: {told}", _remedy(groups))


def _telling(groups: tuple[Culprits, ...]) -> list[Culprits]:
    """The groups, reordered so that the first of each reason comes first."""
    firsts = {group.reason: group for group in reversed(groups)}
    return sorted(groups, key=lambda group: firsts[group.reason] is not group)


def _told(group: Culprits) -> str:
    first = group.names[0]
    count = f" ({len(group.names)} like {group.pattern})" if len(group.names) > 1 else ""
    if group.found == "nothing":
        return f"{first}{count} {group.expected} is {group.reason}"
    return f"{first}{count} is {group.found} in {group.role} and {group.expected}"


def _remedy(groups: tuple[Culprits, ...]) -> str:
    names = [group.names[0] for group in groups]
    fused = any(".experts.gate_up_proj" in name for name in names)
    single = any(".experts.0." in name or ".experts.*." in pattern(name) for name in names)
    if fused and single:
        return (
            "one role stores its experts fused, and another stores them one by one:"
            " save all roles with the same version of transformers"
        )
    suggested = suggest_renames([group for group in groups if not is_head_name(group.pattern)])
    if suggested is not None:
        return suggested
    if any(group.addable for group in groups):
        added = next(group.names[0] for group in groups if group.addable)
        return (
            f"carry over what fine-tuning added, such as {added}, with --added bring,"
            " or leave it out with --added drop"
        )
    if all(group.found == "nothing" for group in groups):
        return "check that the models belong together, or accept these with --allow-missing 'REGEX'"
    return "check that the models belong together, or leave these out with --exclude 'REGEX'"
