"""Paired statistics: hand-counted numbers, oracles by enumeration, and every note."""

import dataclasses
import itertools
import math
import random
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffxfer.evaluation import paired_statistics
from diffxfer.evaluation.paired_statistics import (
    Difference,
    Recovery,
    compare_scores,
    recovered_share,
)
from diffxfer.evaluation.scores import Score

LN2 = math.log(2)
NO_NUMBERS = "its samples are not numbers"
NO_MEAN = "its value is not a mean of samples"
NOT_FINITE = "a sample or the value is not a finite number"
NOISE = "finetuned's own gain may be noise"
EIGHTHS = st.integers(-40, 40).map(lambda number: number / 8)


def make_score(measures, *, value=None, better=True, first=0):
    """A score whose value is the mean of its samples, or −Σll / Σw for pairs."""
    samples = {(f"doc{i:05}", "target", 0): item for i, item in enumerate(measures, first)}
    if value is None:
        value = nats(measures) if isinstance(measures[0], tuple) else mean(measures)
    return Score("task", "metric", "none", value, None, len(samples), better, samples)


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


def nats(pairs):
    return -math.fsum(ll for ll, _ in pairs) / math.fsum(weight for _, weight in pairs)


def discordant(wins, losses, *, unit=1):
    """Two lists that differ in `wins` + `losses` samples and agree in four."""
    ours = [unit] * wins + [0] * losses + [0, 0, unit, unit]
    theirs = [0] * wins + [unit] * losses + [0, 0, unit, unit]
    return ours, theirs


def p_by_enumeration(differences):
    """The share of all 2^n sign flips whose sum is at least as far from 0 as the observed sum."""
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    return sum(total >= abs(sum(differences)) - 1e-9 for total in sums) / len(sums)


# Right or wrong: McNemar's exact test


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (9, 1, 0.021484375),  # 2 · (C(10, 0) + C(10, 1)) / 2^10
        (1, 9, 0.021484375),
        (5, 0, 0.0625),  # 2 / 2^5
        (0, 6, 0.03125),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_right_or_wrong_gets_mcnemars_exact_test(wins, losses, p_value):
    ours, theirs = discordant(wins, losses)
    found = compare_scores(make_score(ours), make_score(theirs))
    assert found.p_value == pytest.approx(p_value, rel=1e-12)
    assert found.delta == pytest.approx((wins - losses) / len(ours))
    assert found.note == ""


def test_a_p_value_that_underflows_is_not_zero():
    found = compare_scores(*map(make_score, discordant(1_100, 0)))
    assert found.p_value == sys.float_info.min


# Other numbers: sign flips


def test_five_gains_of_any_size_are_two_of_32_flips():
    found = compare_scores(make_score([1.5, 2, 3, 4, 5]), make_score([0.0] * 5))
    assert found == Difference(pytest.approx(3.1), 2 / 32, "")


def test_samples_that_tie_do_not_dilute_the_test():
    ours, theirs = [1.5, 2, 3, 4, 5] + [7.0] * 30, [0.0] * 5 + [7.0] * 30
    assert compare_scores(make_score(ours), make_score(theirs)).p_value == 2 / 32


def test_samples_that_all_tie_differ_with_certainty_in_nothing():
    found = compare_scores(make_score([0.3, 0.7, 2.5]), make_score([0.3, 0.7, 2.5]))
    assert found == Difference(0.0, 1.0, "")


@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=5, max_size=8))
@settings(max_examples=40)
def test_few_samples_are_tested_exactly(pairs):
    ours, theirs = ([2.5, *column] for column in zip(*pairs, strict=True))
    found = compare_scores(make_score(ours), make_score(theirs))
    differences = [mine - other for mine, other in pairs]
    assert found.p_value == pytest.approx(p_by_enumeration(differences), rel=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(9, 1), (10, 3), (2, 2)])
def test_flips_of_equal_sizes_are_mcnemars_test(wins, losses):
    by_flips = compare_scores(*map(make_score, discordant(wins, losses, unit=2)))
    by_count = compare_scores(*map(make_score, discordant(wins, losses)))
    assert by_flips.p_value == pytest.approx(by_count.p_value, rel=1e-12)


def test_thirteen_differences_are_exact_and_fourteen_are_drawn():
    assert compare_scores(*map(make_score, discordant(13, 0, unit=2))).p_value == 2 / 2**13
    drawn = compare_scores(*map(make_score, discordant(11, 3, unit=2))).p_value
    assert drawn == pytest.approx(2 * (364 + 91 + 14 + 1) / 2**14, abs=0.01)
    assert drawn * 10_000 == pytest.approx(round(drawn * 10_000))


def test_a_hundred_gains_have_the_least_p_value_that_can_be_drawn():
    ours = [1 + i / 100 for i in range(100)]
    found = compare_scores(make_score(ours), make_score([0.0] * 100))
    assert found.p_value == pytest.approx(2 / 10_000)


def test_random_flips_depend_on_the_seed_alone():
    ours, theirs = map(make_score, discordant(14, 9, unit=2))
    found = [compare_scores(ours, theirs, seed=seed).p_value for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len(set(found)) > 1
    assert max(found) - min(found) < 0.05


# Log-likelihoods with weights


LLS = ([-3.0, -8.5, -2.0, -9.0, -4.0], [-5.0, -8.0, -6.0, -12.0, -5.5])
WEIGHTS = (4, 9, 3, 11, 6)


def weighted(aggregate=lambda each: each, *, weights=WEIGHTS):
    pairs = [list(zip(lls, weights, strict=True)) for lls in LLS]
    return [make_score(each, value=aggregate(nats(each)), better=False) for each in pairs]


@pytest.mark.parametrize("aggregate", [lambda each: each, lambda each: each / LN2, math.exp])
def test_perplexities_are_tested_by_their_log_likelihoods(aggregate):
    ours, theirs = weighted(aggregate)
    expected = p_by_enumeration([mine - other for mine, other in zip(*LLS, strict=True)])
    delta = aggregate(26.5 / 33) - aggregate(36.5 / 33)
    assert compare_scores(ours, theirs) == Difference(pytest.approx(delta), expected, "")
    assert 0 < expected < 0.5


def test_a_perplexity_of_bare_log_likelihoods_is_tested():
    ours, theirs = (make_score(lls, value=math.exp(-mean(lls))) for lls in LLS)
    expected = p_by_enumeration([mine - other for mine, other in zip(*LLS, strict=True)])
    assert compare_scores(ours, theirs).p_value == expected


def test_what_is_nearly_a_perplexity_is_not_tested():
    ours, theirs = weighted(lambda each: math.exp(each) * (1 + 2e-6))
    assert compare_scores(ours, theirs).note == NO_MEAN


def test_other_weights_are_not_tested():
    ours, theirs = weighted()[0], weighted(weights=(4, 9, 3, 11, 7))[1]
    assert compare_scores(ours, theirs).note == "its samples have different weights"


@pytest.mark.parametrize(
    "pairs",
    [
        [(-1e6, 1), (-1e6, 1)],  # whose exponential is no float
        [(1, 0), (0, 0)],  # gold and predicted, as F1 has them
        [(-1, 1), (-1, -3)],
    ],
)
def test_pairs_of_another_kind_are_not_tested(pairs):
    score = make_score(pairs, value=0.5)
    assert compare_scores(score, score) == Difference(0.0, None, NO_MEAN)


# What cannot be tested, and why


UNPAIRED = {
    "no samples": (make_score([], value=0.7), NO_NUMBERS),
    "others": (make_score([1, 0, 1], first=1), "scored on other samples (2 of 4 are shared)"),
    "none shared": (make_score([1, 0, 1], first=9), "scored on other samples (0 of 6 are shared)"),
    "a part": (make_score([0, 1]), "scored on other samples (2 of 3 are shared)"),
    "nan sample": (make_score([1, math.nan, 0], value=0.5), NOT_FINITE),
    "infinite sample": (make_score([1, math.inf, 0], value=0.5), NOT_FINITE),
    "corpus score": (make_score([1, 0, 1], value=31.7), NO_MEAN),
    "nearly the mean": (make_score([1, 0, 1], value=2 / 3 + 2e-6), NO_MEAN),
    "pairs": (make_score([(-1, 1), (-2, 1), (-3, 1)]), "its samples are of two kinds"),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_a_test_that_would_mislead_is_left_out(case):
    odd, note = UNPAIRED[case]
    plain = make_score([0, 0, 1])
    assert compare_scores(odd, plain) == Difference(odd.value - 1 / 3, None, note)
    assert compare_scores(plain, odd) == Difference(1 / 3 - odd.value, None, note)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("case", UNPAIRED)
def test_an_interval_that_would_mislead_is_left_out_but_the_share_stays(case, position):
    odd, note = UNPAIRED[case]
    roles = [make_score([0, 1, 0]), make_score([0, 0, 0]), make_score([1, 1, 1])]
    roles[position] = odd
    graft, target, finetuned = (score.value for score in roles)
    found = recovered_share(*roles)
    if finetuned > target:
        assert found == Recovery((graft - target) / (finetuned - target), None, note)
    else:
        assert found == Recovery(
            None, None, "finetuned is worse than the target: no gain to recover"
        )


def test_one_sample_is_not_tested():
    one, none = make_score([1]), make_score([0])
    assert compare_scores(one, none) == Difference(1.0, None, "only 1 sample")
    assert recovered_share(none, none, one) == Recovery(0.0, None, "only 1 sample")


def test_a_value_may_be_rounded_a_little():
    score = make_score([1, 0, 1], value=0.6666667)
    assert compare_scores(score, make_score([0, 0, 1])).p_value == 1.0


def test_a_mean_of_numbers_that_cancel_may_miss_zero():
    score = make_score([0.1, 0.2, -0.3], value=0.0)
    assert sum([0.1, 0.2, -0.3]) != 0
    assert compare_scores(score, score).p_value == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_finite_number_is_not_tested(value):
    odd, plain = make_score([1, 0, 1], value=value), make_score([0, 0, 1])
    found = compare_scores(odd, plain)
    assert found.delta == pytest.approx(value, nan_ok=True)
    assert (found.p_value, found.note) == (None, NOT_FINITE)
    for roles in itertools.permutations((odd, plain, make_score([1, 1, 1]))):
        assert recovered_share(*roles) == Recovery(None, None, "a value is not a finite number")


# The recovered share


@pytest.mark.parametrize("better", [True, None])
def test_a_share_of_a_gain(better):
    target, graft, finetuned = (
        make_score([1] * right + [0] * (40 - right), better=better) for right in (10, 20, 30)
    )
    found = recovered_share(graft, target, finetuned)
    assert (found.share, found.note) == (pytest.approx(0.5), "")
    assert recovered_share(target, graft, finetuned).share == pytest.approx(-1.0)
    worse = recovered_share(graft, finetuned, target)
    assert worse == Recovery(None, None, "finetuned is worse than the target: no gain to recover")


def test_a_share_of_a_gain_where_lower_is_better():
    target, graft, finetuned = (
        make_score([loss + i / 100 for i in range(40)], better=False) for loss in (3.0, 2.25, 2.0)
    )
    found = recovered_share(graft, target, finetuned)
    assert found == Recovery(pytest.approx(0.75), pytest.approx((0.75, 0.75)), "")
    worse = recovered_share(graft, finetuned, target)
    assert worse == Recovery(None, None, "finetuned is worse than the target: no gain to recover")
    # A zero with a sign would be shown as -0.00.
    nothing = recovered_share(target, target, finetuned)
    assert [math.copysign(1, each) for each in (nothing.share, *nothing.interval)] == [1, 1, 1]


def test_without_a_gain_there_is_no_share():
    even, odd = make_score([1, 0, 1, 0]), make_score([0, 1, 0, 1])
    expected = Recovery(None, None, "finetuned gains nothing over the target")
    assert recovered_share(make_score([1, 1, 1, 1]), even, odd) == expected
    noisy = make_score([0.1, 0.2], value=0.30000000000000004), make_score([0.1, 0.2], value=0.3)
    assert recovered_share(even, *noisy) == expected


# Its interval


def interval_by_loops(draw, count):
    """Percentiles of `draw` over 3,000 random lists of `count` indices."""
    rng = random.Random(7)
    shares = [draw([rng.randrange(count) for _ in range(count)]) for _ in range(3_000)]
    return tuple(np.percentile(shares, (2.5, 97.5)))


@pytest.mark.parametrize("kind", ["right or wrong", "numbers"])
def test_the_interval_is_of_the_same_draws_for_all_three(kind):
    rng = random.Random(3)
    target = [float(rng.random() < 0.2) for _ in range(60)]
    finetuned = [float(rng.random() < 0.8) for _ in target]
    graft = [
        each if rng.random() < 0.6 else old for each, old in zip(finetuned, target, strict=True)
    ]
    if kind == "numbers":
        # What a document adds to all three cancels in each draw, if the draws are paired.
        target, finetuned, graft = (
            [each + 9.25 * (i % 5) for i, each in enumerate(scores)]
            for scores in (target, finetuned, graft)
        )

    def draw(chosen):
        before, best, ours = (
            sum(scores[i] for i in chosen) for scores in (target, finetuned, graft)
        )
        return (ours - before) / (best - before)

    found = recovered_share(*map(make_score, (graft, target, finetuned)))
    assert found.interval == pytest.approx(interval_by_loops(draw, 60), abs=0.02)
    assert found.interval[0] < found.share < found.interval[1]
    assert found.interval[1] - found.interval[0] > 0.2


@pytest.mark.parametrize("scale", [1, 1 / LN2])
def test_the_interval_of_log_likelihoods_weighs_each_draw_by_itself(scale):
    rng = random.Random(5)
    weights = [rng.randrange(1, 200) for _ in range(50)]
    target = [-w * rng.uniform(2, 3) for w in weights]
    finetuned = [-w * rng.uniform(1, 2) for w in weights]
    graft = [-w * rng.uniform(1, 3) for w in weights]

    def draw(chosen):
        total = sum(weights[i] for i in chosen)
        before, best, ours = (
            -scale * sum(lls[i] for i in chosen) / total for lls in (target, finetuned, graft)
        )
        return (ours - before) / (best - before)

    roles = [list(zip(lls, weights, strict=True)) for lls in (graft, target, finetuned)]
    scores = [make_score(each, value=scale * nats(each), better=False) for each in roles]
    found = recovered_share(*scores)
    assert found.interval == pytest.approx(interval_by_loops(draw, 50), abs=0.03)
    assert found.share == pytest.approx(draw(range(50)))


def test_a_constant_share_has_an_interval_of_no_width():
    target, finetuned = [0.0] * 8, [1.0, 2, 3, 4, 5, 6, 7, 8]
    graft = [each / 4 for each in finetuned]
    found = recovered_share(*map(make_score, (graft, target, finetuned)))
    assert found == Recovery(0.25, (0.25, 0.25), "")


def test_a_perplexity_has_a_share_but_no_interval():
    graft, target = weighted(math.exp)
    found = recovered_share(target, target, graft)
    assert found == Recovery(0.0, None, "its value is not linear in its samples")


@pytest.mark.parametrize(("gaining", "has_interval"), [(1, False), (3, False), (7, True)])
def test_a_gain_that_vanishes_in_many_draws_has_no_interval(gaining, has_interval):
    # e^-3, 5 %, of the draws have none of three gaining samples; e^-7, 0.1 %, none of seven.
    finetuned = [1] * gaining + [0] * (300 - gaining)
    graft = [1] + [0] * 299
    found = recovered_share(make_score(graft), make_score([0] * 300), make_score(finetuned))
    assert found.share == pytest.approx(1 / gaining)
    assert (found.interval is not None, found.note) == (has_interval, "" if has_interval else NOISE)
    if has_interval:
        assert found.interval[0] == 0
        assert 1 / 7 < found.interval[1] < 1


def test_a_gain_that_turns_in_many_draws_has_no_interval():
    target, finetuned = discordant(20, 21)
    found = recovered_share(*map(make_score, (target, target, finetuned)))
    assert found == Recovery(0.0, None, NOISE)


def test_rounding_is_no_gain_in_a_draw():
    # 3.5 % of the draws gain nothing; 1.5 %, too few to tell, if a sum such as 1e-17 is a gain.
    target = [0.0] * 8 + [0.7 + 0.1] * 2 + [0.0] * 30
    finetuned = [0.1] * 8 + [0.7] * 2 + [0.0] * 30
    found = recovered_share(*map(make_score, (target, target, finetuned)))
    assert found == Recovery(0.0, None, NOISE)


def test_the_interval_depends_on_the_seed_alone():
    rng = np.random.default_rng(0)
    graft, target, finetuned = (make_score(list(rng.normal(m, 1, 30))) for m in (1, 0, 2))
    one, again, two = (recovered_share(graft, target, finetuned, seed=s) for s in (1, 1, 2))
    assert one == again
    assert one.interval != two.interval
    assert one.interval == pytest.approx(two.interval, abs=0.1)


# Whatever the samples


@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=2, max_size=20))
@settings(max_examples=40, deadline=None)
def test_swapping_the_roles_turns_the_difference_and_nothing_else(pairs):
    ours, theirs = (make_score(column) for column in zip(*pairs, strict=True))
    there, back = compare_scores(ours, theirs), compare_scores(theirs, ours)
    assert there.delta == -back.delta
    assert there.p_value == back.p_value
    assert 0 < there.p_value <= 1


@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=2, max_size=20))
@settings(max_examples=40, deadline=None)
def test_the_ends_of_the_scale_are_0_and_1(pairs):
    before, after = zip(*pairs, strict=True)
    assume(mean(before) != mean(after))
    better = mean(after) > mean(before)
    target, finetuned = (make_score(each, better=better) for each in (before, after))
    for graft, end in ((target, 0.0), (finetuned, 1.0)):
        found = recovered_share(graft, target, finetuned)
        assert found.share == end
        assert found.interval in ((end, end), None)
        assert (found.interval is None) == (found.note == NOISE)


def reorder(score, rng):
    keys = list(score.samples)
    order = [keys[i] for i in rng.permutation(len(keys))]
    return dataclasses.replace(score, samples={key: score.samples[key] for key in order})


def test_the_order_of_samples_changes_nothing():
    rng = np.random.default_rng(0)
    roles = [make_score(list(rng.normal(m, 1, 30))) for m in (0.5, 0.3, 1.5)]
    shuffled = [reorder(score, rng) for score in roles]
    assert [list(score.samples) for score in shuffled] != [list(score.samples) for score in roles]
    assert compare_scores(*shuffled[:2]) == compare_scores(*roles[:2])
    assert recovered_share(*shuffled) == recovered_share(*roles)


def test_memory_stays_flat(monkeypatch):
    # Fewer draws take less time but as much memory, unless all draws are held at once.
    monkeypatch.setattr(paired_statistics, "_RESAMPLES", 1_500)
    rng = np.random.default_rng(0)
    roles = [make_score(list(rng.normal(m, 1, 20_000))) for m in (1, 0, 2)]
    tracemalloc.start()
    try:
        assert compare_scores(*roles[:2]).p_value < 0.01
        assert recovered_share(*roles).interval is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
