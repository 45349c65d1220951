"""The table of a graft that was quantised anew: where it is far from the exact one, on stdout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffxfer.cli.adapter_table import print_table
from diffxfer.diffs.artifact.kept import layer_of, natural
from diffxfer.diffs.matching.names import pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.diffs.jobs.report import Report, StoredError

MOST_ROWS = 28
"""With its heading and the last row, a table has 30 lines at most."""


def print_stored_errors(report: Report) -> None:
    """Print the errors by decoder layer, or by kind of module if there are more layers than fit.

    Args:
        report: the report of a command; nothing is printed if fewer than two tensors were
            quantised anew.
    """
    errors = report.requantized
    if len(errors) < 2:
        return
    groups, heading = _grouped(errors, layer_of), "layer"
    if len(groups) > MOST_ROWS:
        groups, heading = _grouped(errors, pattern), "kind of tensor"
    names = sorted(groups, key=natural)
    if len(names) > MOST_ROWS:
        names = sorted(names, key=lambda name: -_ratio(groups[name]))
        rest = [error for name in names[MOST_ROWS - 1 :] for error in groups[name]]
        names = sorted(names[: MOST_ROWS - 1], key=natural)
        groups, names = {**groups, "others": rest}, [*names, "others"]
    rows = [_row(name, groups[name]) for name in names]
    headings = heading, "tensors", "‖error‖/‖α·Δ‖", "worst", "of the tensor"
    print_table(headings, [*rows, _row("all", errors)])


def _grouped(
    errors: Sequence[StoredError], group_of: Callable[[str], str]
) -> dict[str, list[StoredError]]:
    groups: dict[str, list[StoredError]] = {}
    for error in errors:
        groups.setdefault(group_of(error.name), []).append(error)
    return groups


def _row(name: str, errors: Sequence[StoredError]) -> tuple[str, ...]:
    worst = max(errors, key=lambda error: error.ratio)
    where = worst.name.removeprefix(f"{name}.")
    return name, f"{len(errors):,}", _percent(_ratio(errors)), _percent(worst.ratio), where


def _ratio(errors: Sequence[StoredError]) -> float:
    """‖error‖/‖α·Δ‖ of several tensors together."""
    error, change = (math.hypot(*(getattr(e, key) for e in errors)) for key in ("error", "change"))
    if change:
        return error / change
    return math.inf if error else 0.0


def _percent(ratio: float) -> str:
    return "∞" if math.isinf(ratio) else f"{ratio:.1%}"
