"""Paired tests and intervals for the difference between two models' scores, without I/O."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

if TYPE_CHECKING:
    from diffxfer.evaluation.scores import Score

_Array: TypeAlias = npt.NDArray[np.float64]

_RESAMPLES = 9_999
_BATCH_NUMBERS = 1_500_000  # of 8 bytes each; scipy allocates about five arrays of this size
_CHANCE = 0.05  # with a larger p-value, the gain that is divided by may be noise
_NOISY = 0.025  # the share of draws in the lower tail of a 95 % interval


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two scores.

    Attributes:
        delta: score − baseline.
        p_value: of the paired test of delta = 0; None if no test is valid.
        note: the reason why there is no p-value, else empty.
    """

    delta: float
    p_value: float | None
    note: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """The share of the gain of fine-tuning that a graft recovers.

    Attributes:
        share: 0 for the score of the target, 1 for that of its fine-tuning; None if undefined.
        interval: the 95 % interval of the share; None if there is none.
        note: the reason why a number is missing, else empty.
    """

    share: float | None
    interval: tuple[float, float] | None
    note: str


class _Pairs(NamedTuple):
    """The same samples of several models.

    Attributes:
        values: the value of each sample, shape `(models, samples)`.
        linear: whether the scores are linear in the values' sums.
    """

    values: _Array
    linear: bool


def compare_scores(score: Score, baseline: Score, *, seed: int = 1234) -> Difference:
    """Compare two models' scores on the same samples.

    Binary samples are tested with McNemar's exact test. Other samples are tested with a two-sided
    sign-flip test of the paired differences: exact for up to 13 differences, else with 9,999 random
    flips.

    Args:
        score: the score of a model.
        baseline: the score of the model to compare with, in the same column.
        seed: the seed of the random flips.

    Returns:
        The difference; if a test would be misleading, with a note instead of a p-value.
    """
    delta = float(score.value - baseline.value)
    pairs = _pair_samples(score, baseline)
    if isinstance(pairs, str):
        return Difference(delta, None, pairs)
    ours, theirs = pairs.values
    if np.isin(pairs.values, (0, 1)).all():
        p_value = _mcnemar(int((ours > theirs).sum()), int((ours < theirs).sum()))
    else:
        p_value = _sign_flip(ours - theirs, seed)
    # Below about 1e-308 a p-value underflows, but none is 0.
    return Difference(delta, max(p_value, sys.float_info.min), "")


def recovered_share(
    graft: Score, target: Score, finetuned: Score, *, interval: bool = True, seed: int = 1234
) -> Recovery:
    """Compute which share of the gain of fine-tuning over the target a graft recovers.

    The interval is a percentile bootstrap interval (Efron 1981) over 9,999 draws of samples, which
    are the same for all three models. The share is undefined in draws without a gain of the
    fine-tuned model; they are omitted. If they exceed 2.5 %, or the gain itself has p > 0.05, there
    is no interval.

    Args:
        graft: the score of the target with the diff vector.
        target: the score of the target, in the same column.
        finetuned: the score of the directly fine-tuned target, in the same column.
        interval: whether to compute the interval, which takes a second or two for a large task.
        seed: the seed of the draws.

    Returns:
        (graft − target) / (finetuned − target) and its interval; a note if one is missing.
    """
    note = _why_no_gain(graft, target, finetuned)
    if note:
        return Recovery(None, None, note)
    # Adding 0.0 turns -0.0, which results if lower scores are better, into 0.0.
    share = float((graft.value - target.value) / (finetuned.value - target.value)) + 0.0
    if not interval:
        return Recovery(share, None, "")
    pairs = _pair_samples(graft, target, finetuned)
    if isinstance(pairs, str):
        return Recovery(share, None, pairs)
    if not pairs.linear:
        return Recovery(share, None, "its value is not linear in its samples")
    ours, before, best = pairs.values
    chance = compare_scores(finetuned, target, seed=seed).p_value
    sure = chance is not None and chance <= _CHANCE
    ends = _ratio_interval(ours - before, best - before, seed) if sure else None
    return Recovery(share, ends, "" if ends else "finetuned's own gain may be noise")


def _why_no_gain(graft: Score, target: Score, finetuned: Score) -> str:
    values = graft.value, target.value, finetuned.value
    if not all(map(math.isfinite, values)):
        return "a value is not a finite number"
    # Equal scores may differ by rounding if their samples differ; that is not a gain.
    if math.isclose(finetuned.value, target.value, abs_tol=1e-12):
        return "finetuned gains nothing over the target"
    if (finetuned.value > target.value) == (finetuned.higher_is_better is False):
        return "finetuned is worse than the target: no gain to recover"
    return ""


def _pair_samples(*scores: Score) -> _Pairs | str:
    """Align the samples of several models, in an order that depends only on their keys.

    Returns:
        The samples, or the reason why a test of them would not be a test of the scores.
    """
    note = _why_unpaired(*scores)
    if note:
        return note
    keys = sorted(scores[0].samples)
    measures = np.array([[score.samples[key] for key in keys] for score in scores], dtype=float)
    if not (np.isfinite(measures).all() and all(math.isfinite(score.value) for score in scores)):
        return "a sample or the value is not a finite number"
    weighted = measures.ndim == 3
    values, weights = (
        np.moveaxis(measures, -1, 0) if weighted else (measures, np.ones_like(measures))
    )
    linear = True
    for score, row, weight in zip(scores, values, weights, strict=True):
        if not _is_mean(score.value, row, weight, weighted=weighted):
            if not _is_perplexity(score.value, row, weight):
                return "its value is not a mean of samples"
            linear = False
    # Only with equal weights do the sums of the values decide which score is higher.
    if not (weights == weights[0]).all():
        return "its samples have different weights"
    return _Pairs(values, linear)


def _why_unpaired(*scores: Score) -> str:
    if not all(score.samples for score in scores):
        return "its samples are not numbers"
    keys = [score.samples.keys() for score in scores]
    shared, every = set(keys[0]).intersection(*keys), set(keys[0]).union(*keys)
    if shared != every:
        return f"scored on other samples ({len(shared):,} of {len(every):,} are shared)"
    if len(shared) < 2:
        return "only 1 sample"
    kinds = {isinstance(item, tuple) for score in scores for item in score.samples.values()}
    return "its samples are of two kinds" if len(kinds) > 1 else ""


def _is_mean(value: float, values: _Array, weights: _Array, *, weighted: bool) -> bool:
    total = weights.sum()
    if total <= 0:
        return False
    mean = float(values.sum() / total)
    # The second mean is lm-eval's bits_per_byte; the first one is the same in nats.
    means = (-mean, -mean / math.log(2)) if weighted else (mean,)
    # A mean near 0 has the rounding error of the larger numbers that cancel in it.
    rounding = 1e-12 * float(np.abs(values).sum() / total)
    return any(math.isclose(value, each, rel_tol=1e-6, abs_tol=rounding) for each in means)


def _is_perplexity(value: float, values: _Array, weights: _Array) -> bool:
    """Whether a value is exp(−Σ values / Σ weights), for lambada's `perplexity` with weights 1."""
    total = weights.sum()
    # Logarithms are compared, because the exponential of a large mean may overflow.
    return bool(total > 0 and value > 0 and abs(math.log(value) + values.sum() / total) <= 1e-6)


def _mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact test (1947): each discordant pair is a fair coin toss."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def _sign_flip(differences: _Array, seed: int) -> float:
    """Fisher's randomization test: without an effect, either sign of a difference is as likely.

    Args:
        differences: of the pairs, shape `(samples,)`.
        seed: the seed of the random flips, if there are too many to try all.

    Returns:
        The two-sided p-value.
    """
    # A zero has no sign; without zeros, more tests have few enough flips to be exact.
    moved = differences[differences != 0]
    if moved.size < 2:
        return 1.0  # both signs of a single difference are equally far from 0
    rng = np.random.default_rng(seed)
    options = {"vectorized": True, "n_resamples": _RESAMPLES, "batch": _batch(moved.size)}
    if 2**moved.size <= _RESAMPLES:
        test = stats.permutation_test(
            (moved,), _total, permutation_type="samples", rng=rng, **options
        )
        return float(test.pvalue)

    # The same test with random flips; permutation_test shuffles each pair and is 20 times slower.
    def flipped(size: tuple[int, ...]) -> _Array:
        signs = 2 * rng.integers(0, 2, size, dtype=np.int8) - 1
        return np.asarray(moved * signs)

    return float(stats.monte_carlo_test(moved, flipped, _total, **options).pvalue)


def _ratio_interval(parts: _Array, wholes: _Array, seed: int) -> tuple[float, float] | None:
    """The bootstrap interval of Σ parts / Σ wholes.

    The divisor of the scores and the sign of log-likelihoods are the same for all models of a
    draw, so they cancel in the ratio, and sums suffice.

    Args:
        parts: the gain of the graft in each sample, shape `(samples,)`.
        wholes: the gain of the fine-tuned model in each sample, shape `(samples,)`.
        seed: the seed of the draws.

    Returns:
        The 2.5th and 97.5th percentiles; None if too many draws have no gain to divide by.
    """
    drawn = stats.bootstrap(
        (parts, wholes),
        lambda *chosen, axis: np.stack([_total(each, axis) for each in chosen]),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=_batch(parts.size),
        rng=np.random.default_rng(seed),
    )
    part, whole = drawn.bootstrap_distribution
    # A sum that should be zero may be a rounding error of either sign.
    gains = whole * np.sign(wholes.sum()) > 1e-9 * abs(wholes.sum())
    if gains.mean() < 1 - _NOISY:
        return None
    low, high = np.percentile(part[gains] / whole[gains] + 0.0, (2.5, 97.5))
    return float(low), float(high)


def _total(values: _Array, axis: int) -> _Array:
    return np.asarray(values.sum(axis=axis))


def _batch(samples: int) -> int:
    return max(1, min(_RESAMPLES, _BATCH_NUMBERS // samples))
