"""A share of agreements, with an interval that allows for dependence within a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share with its 95 % interval.

    Attributes:
        share: equal / counted.
        equal: on how many the models agree.
        counted: of how many.
        interval: Wilson's. Positions of the same row depend on each other, so they count as the
            number of independent ones that would vary as much from row to row.
        what: what is counted, in words.
    """

    share: float
    equal: int
    counted: int
    interval: tuple[float, float]
    what: str

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "share": self.share,
            "equal": self.equal,
            "counted": self.counted,
            "interval": list(self.interval),
            "what": self.what,
        }


def share_of(what: str, equal: Sequence[Sequence[bool]]) -> Share:
    """The share over all positions of all rows.

    Args:
        what: what is counted, in words.
        equal: for each row, at each of its positions, whether the models agree.
    """
    total = sum(map(len, equal))
    right = sum(map(sum, equal))
    share = right / total
    interval = wilson(share, _independent(equal, share))
    return Share(share, right, total, interval, what)


def _independent(equal: Sequence[Sequence[bool]], share: float) -> float:
    """How many independent positions would vary as much: from the number of rows to all positions.

    The variance is that of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, 6.3), and
    Student's quantile allows for a variance from few rows (Korn and Graubard 1998).
    """
    from scipy.stats import t

    rows, total = len(equal), sum(map(len, equal))
    if rows == total or rows < 2:
        return rows
    squares = sum((sum(row) - share * len(row)) ** 2 for row in equal)
    variance = squares / total**2 * rows / (rows - 1)
    if share in (0, 1) or variance == 0:
        return rows
    number = share * (1 - share) / variance * (_Z / float(t.ppf(0.975, rows - 1))) ** 2
    return min(max(number, rows), total)


def wilson(share: float, number: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Args:
        share: of independent trials.
        number: how many there were.
    """
    shift = _Z**2 / number
    centre = (share + shift / 2) / (1 + shift)
    half = _Z / (1 + shift) * math.sqrt(share * (1 - share) / number + shift / number / 4)
    # Exact at the ends, where the sums round.
    low = 0.0 if share <= 0 else centre - half
    return low, 1.0 if share >= 1 else centre + half
