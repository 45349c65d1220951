"""The barrier of a path and its interval, against loops over rows and points."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffxfer.probing.barrier import find_barrier, mean_loss

TS = (0.0, 0.25, 0.5, 0.75, 1.0)


def losses(rows: int = 23) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    counts = generator.integers(1, 12, rows)
    heights = np.array([0.5, 0.9, 1.4, 0.8, 0.3])[:, None]
    return (heights + generator.gamma(1, 0.2, (5, rows))) * counts, counts


def by_hand(sums: list[list[float]], counts: list[int], drawn: list[int]) -> float:
    """The barrier over the drawn rows, from its definition."""
    tokens = math.fsum(counts[row] for row in drawn)
    means = [math.fsum(place[row] for row in drawn) / tokens for place in sums]
    above = [mean - ((1 - t) * means[0] + t * means[-1]) for t, mean in zip(TS, means, strict=True)]
    return max(above)


def test_the_barrier_is_the_highest_point_above_the_line() -> None:
    sums, counts = losses()
    found = find_barrier(TS, sums, counts)
    assert found.barrier == pytest.approx(by_hand(sums.tolist(), counts.tolist(), [*range(23)]))
    assert found.barrier > 0.5


def test_the_interval_is_that_of_resamples_drawn_one_by_one() -> None:
    sums, counts = losses()
    found = find_barrier(TS, sums, counts, seed=3)
    assert found.interval is not None
    generator = np.random.default_rng(3)
    barriers = []
    for _ in range(2000):
        times = generator.multinomial(23, [1 / 23] * 23)
        drawn = [row for row, count in enumerate(times) for _ in range(count)]
        barriers.append(by_hand(sums.tolist(), counts.tolist(), drawn))
    assert found.interval == pytest.approx(
        (np.quantile(barriers, 0.025), np.quantile(barriers, 0.975))
    )
    assert found.interval[0] < found.barrier < found.interval[1]
    assert find_barrier(TS, sums, counts, seed=4).interval != found.interval


def test_the_same_rows_are_drawn_at_every_point() -> None:
    # Rows differ much from each other, and each rises by the same 0.5: only the pairing shows it.
    level = np.linspace(0, 100, 40)
    sums = np.stack([level, level + 0.5, level])
    found = find_barrier((0.0, 0.5, 1.0), sums, np.ones(40, np.int64))
    assert found.barrier == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.5, 0.5))


def test_many_rows_are_resampled_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = losses()
    whole = find_barrier(TS, sums, counts)
    monkeypatch.setattr("diffxfer.probing.barrier._WEIGHTS_AT_ONCE", 700)
    assert find_barrier(TS, sums, counts).interval == pytest.approx(whole.interval)


def test_a_path_that_sags_has_no_barrier() -> None:
    sums = np.array([[1.0, 2.0], [0.5, 0.5], [1.0, 2.0]])
    found = find_barrier((0.0, 0.5, 1.0), sums, np.ones(2, np.int64))
    assert found.barrier == 0
    assert found.interval == (0, 0)


def test_one_row_has_no_interval_and_no_standard_error() -> None:
    sums = np.array([[1.0], [3.0], [1.0]])
    assert find_barrier((0.0, 0.5, 1.0), sums, np.array([2])).interval is None
    assert mean_loss(sums[1], np.array([2])) == (1.5, None)


def test_the_mean_weighs_tokens_alike_and_its_error_is_that_of_rows() -> None:
    sums, counts = losses(400)
    mean, stderr = mean_loss(sums[2], counts)
    assert mean == pytest.approx(math.fsum(sums[2]) / sum(counts.tolist()))
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 400, (4000, 400))
    resampled = sums[2][drawn].sum(1) / counts[drawn].sum(1)
    assert stderr == pytest.approx(resampled.std(), rel=0.05)
    # Rows of one token: the usual standard error of a mean.
    alone = sums[2] / counts
    _, usual = mean_loss(alone, np.ones(400, np.int64))
    assert usual == pytest.approx(alone.std(ddof=1) / 20)
