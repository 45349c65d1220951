"""The rule: what grafts at some distance recovered, as a range, and how well it does elsewhere.

At each of some distances, the range holds nearly all of the nearest settings. It is widened until
nine in ten settings of a family lie inside the range that was made without that family: the user's
family is another one, too. Every line of the table falls with the distance.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

GRIDS = {
    "activations": (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.12, 1.4),
    "weights": (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.1, 1.6, 2.2, 3.2, 4.5, 6.4, 9.0),
}
# Where the target is all but base, a graft is all but the fine-tune itself.
SAME = {"activations": 0.01, "weights": 0.02}
RATIOS = {"activations": "activation_ratio", "weights": "weight_ratio"}
NEAREST, TAIL, INSIDE = 12, 0.05, 0.9
LEAST_WIDTH = 5.0

Knots = list[tuple[float, ...]]
"""Ratio, low, expected and high, in %."""


def graded(rows: Sequence[dict[str, Any]], *, held_out: bool) -> list[dict[str, Any]]:
    """Return the settings that count, of the held-out families or of the others."""
    return [row for row in rows if row["recovery"] is not None and row["held_out"] is held_out]


def recoveries(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the recovery of each setting, between 0 and 100."""
    shares: np.ndarray = np.clip([row["recovery"] for row in rows], 0.0, 100.0)
    return shares


def raw_knots(rows: Sequence[dict[str, Any]], basis: str) -> np.ndarray:
    """Return what the settings nearest to each distance recovered, shape `(distances, 4)`.

    A distance in a gap between the settings meets those on both sides of it.
    """
    logs, shares = np.log([row[RATIOS[basis]] for row in rows]), recoveries(rows)
    knots = [(SAME[basis], 100.0, 100.0, 100.0)]
    for ratio in GRIDS[basis]:
        nearest = np.argsort(np.abs(logs - math.log(ratio)), kind="stable")[:NEAREST]
        near = shares[nearest]
        knots.append((ratio, np.quantile(near, TAIL), near.mean(), np.quantile(near, 1 - TAIL)))
    table = np.array(knots)
    # Falling: a range may only become wider by it, so low falls from the left, high from the right.
    table[:, 1] = np.minimum.accumulate(table[:, 1])
    table[:, 2] = _falling(table[:, 2])
    table[:, 3] = np.maximum.accumulate(table[::-1, 3])[::-1]
    return table


def _falling(values: np.ndarray) -> np.ndarray:
    """Return the falling sequence that is nearest to `values` by least squares."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([float(value)])
        while len(blocks) > 1 and np.mean(blocks[-2]) < np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])


def looked_up(table: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Return low, expected and high at some distances, shape `(ratios, 3)`."""
    logs = np.log(np.maximum(ratios, 1e-12))
    return np.stack(
        [np.interp(logs, np.log(table[:, 0]), table[:, column]) for column in (1, 2, 3)], axis=1
    )


def widened(table: np.ndarray, by: float) -> np.ndarray:
    """Return the table with each range wider on both sides by a multiple of its width."""
    wider = table.copy()
    margin = by * (table[:, 3] - table[:, 1] + LEAST_WIDTH)
    wider[:, 1] = np.minimum.accumulate(np.clip(table[:, 1] - margin, 0, 100))
    wider[:, 3] = np.maximum.accumulate(np.clip(table[:, 3] + margin, 0, 100)[::-1])[::-1]
    return wider


def margin_needed(rows: Sequence[dict[str, Any]], basis: str) -> float:
    """Return the multiple by which ranges made without a family must grow to hold 90 % of it."""
    needed: list[float] = []
    for family in sorted({row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        table = raw_knots([row for row in rows if row["family"] != family], basis)
        low, _, high = looked_up(table, [row[RATIOS[basis]] for row in own]).T
        shares = recoveries(own)
        outside = np.maximum(low - shares, shares - high)
        needed.extend(outside / (high - low + LEAST_WIDTH))
    return max(0.0, float(np.quantile(needed, INSIDE)))


def fit(rows: Sequence[dict[str, Any]], basis: str) -> Knots:
    """Return the rule's table, rounded to a tenth of a percent.

    Args:
        rows: all settings; those of held-out families are not looked at.
        basis: `activations` or `weights`.
    """
    known = graded(rows, held_out=False)
    table = widened(raw_knots(known, basis), margin_needed(known, basis))
    return [
        (round(float(ratio), 3), *(round(float(share), 1) for share in shares))
        for ratio, *shares in table
    ]


def record(rows: Sequence[dict[str, Any]], basis: str, knots: Knots) -> dict[str, float | int]:
    """Return how well a table agrees with some settings."""
    low, expected, high = looked_up(np.array(knots), [row[RATIOS[basis]] for row in rows]).T
    shares = recoveries(rows)
    inside = (low - 0.05 <= shares) & (shares <= high + 0.05)
    ratios = [row[RATIOS[basis]] for row in rows]
    return {
        "families": len({row["family"] for row in rows}),
        "settings": len(rows),
        "spearman": round(float(-spearmanr(ratios, shares).statistic), 2),
        "inside": round(100 * float(inside.mean()), 1),
        "mean_error": round(float(np.abs(expected - shares).mean()), 1),
        "mean_width": round(float((high - low).mean()), 1),
    }
