"""The loss along a path between two models, and its barrier with an interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 2000
"""The number of resamples of the bootstrap."""
LEVEL = 0.95
"""The confidence of the interval."""
_WEIGHTS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class Barrier:
    """How far the loss rises, on the way between two models, above the line between theirs.

    Attributes:
        barrier: the maximum over the path of loss − the straight line between the losses of the
            ends, in nats per token; 0 where the loss stays on or below that line.
        interval: the 95 % interval of it over rows, by bootstrap; None for fewer than two rows.
    """

    barrier: float
    interval: tuple[float, float] | None


def mean_loss(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float | None]:
    """The mean loss of rows, each weighted by its number of scored tokens.

    This is the loss per token, of all rows together: the sum of all losses / the number of all
    scored tokens. Its standard error takes rows as independent and tokens of a row as not, by the
    usual approximation for a ratio of two sums.

    Args:
        sums: the sum of the losses of the tokens of each row, shape `(rows,)`.
        counts: the number of scored tokens of each row, shape `(rows,)`.

    Returns:
        The mean and its standard error; None for fewer than two rows.
    """
    mean = float(sums.sum() / counts.sum())
    rows = len(sums)
    if rows < 2:
        return mean, None
    residuals = sums - mean * counts
    spread = rows / (rows - 1) * float((residuals**2).sum())
    return mean, spread**0.5 / float(counts.sum())


def find_barrier(
    ts: Sequence[float],
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Barrier:
    """The barrier of a path, and its interval over rows.

    A resample draws as many rows as there are, with replacement, and the same ones at every point.
    The interval lies between two quantiles of the barriers of the resamples. Each of these is a
    maximum, and none is negative, so noise alone moves the interval up, never below 0.

    Args:
        ts: the places on the path, from 0 to 1.
        sums: the sum of the losses of the tokens of each row at each place, `(places, rows)`.
        counts: the number of scored tokens of each row, shape `(rows,)`.
        seed: of the resamples.
        resamples: their number.

    Returns:
        The barrier.
    """
    import numpy as np

    assert (ts[0], ts[-1]) == (0, 1), ts
    rows = len(counts)
    found = float(_barriers(ts, sums.sum(1)[None] / counts.sum())[0])
    if rows < 2:
        return Barrier(found, None)
    generator = np.random.default_rng(seed)
    step = max(1, _WEIGHTS_AT_ONCE // rows)
    parts = []
    for begin in range(0, resamples, step):
        # How often each row is drawn, in each resample.
        drawn = generator.multinomial(
            rows, np.full(rows, 1 / rows), min(step, resamples - begin)
        ).astype(np.float64)
        parts.append(_barriers(ts, (drawn @ sums.T) / (drawn @ counts)[:, None]))
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(parts), [outside, 1 - outside])
    return Barrier(found, (float(low), float(high)))


def _barriers(ts: Sequence[float], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The barrier of each path, from losses of shape `(paths, places)`."""
    import numpy as np

    t = np.asarray(ts)
    line = losses[:, :1] * (1 - t) + losses[:, -1:] * t
    highest: NDArray[np.float64] = (losses - line).max(axis=1)
    return highest
