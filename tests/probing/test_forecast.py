"""The forecast: ranges that fall with the distance, their reason, and their record."""

from __future__ import annotations

import json
import math

import pytest

from diffxfer.errors import EvaluationError
from diffxfer.probing.forecast import Forecast, forecast
from diffxfer.probing.forecast_rule import RULES

DISTANCES = [0.0, 1e-9, *(1.15**i / 1000 for i in range(80)), 1e9]


def at(basis: str, ratio: float) -> Forecast:
    return forecast(ratio) if basis == "weights" else forecast(1.0, ratio)


@pytest.mark.parametrize("basis", RULES)
def test_ranges_are_ordered_and_fall(basis: str) -> None:
    found = [at(basis, ratio) for ratio in DISTANCES]
    for each in found:
        assert 0 <= each.low <= each.expected <= each.high <= 100
        assert each.low < each.high
        assert each.basis == basis
    for key in ("low", "expected", "high"):
        values = [getattr(each, key) for each in found]
        assert values == sorted(values, reverse=True), key
    assert found[0].expected > 80
    assert found[-1].expected < 20


@pytest.mark.parametrize("basis", RULES)
def test_between_two_lines_of_the_table_it_is_half_way(basis: str) -> None:
    for left, right in zip(RULES[basis].knots, RULES[basis].knots[1:], strict=False):
        here = at(basis, left.ratio)
        assert (here.low, here.expected, here.high) == (left.low, left.expected, left.high)
        middle = at(basis, math.sqrt(left.ratio * right.ratio))
        assert middle.low == pytest.approx((left.low + right.low) / 2, abs=0.051)
        assert middle.high == pytest.approx((left.high + right.high) / 2, abs=0.051)


def test_beyond_the_table_the_ends_hold_and_it_is_said() -> None:
    first, last = RULES["weights"].knots[0], RULES["weights"].knots[-1]
    near, far = forecast(first.ratio / 100), forecast(last.ratio * 100)
    assert (near.low, near.high) == (first.low, first.high)
    assert (far.low, far.high) == (last.low, last.high)
    assert "No setting was measured closer" in near.reason
    assert "No setting was measured farther" in far.reason
    assert "No setting was measured" not in forecast(first.ratio).reason


def test_activations_win_where_they_are_given() -> None:
    alone, both = forecast(9.0), forecast(9.0, 0.03)
    assert (alone.basis, alone.ratio) == ("weights", 9.0)
    assert (both.basis, both.ratio) == ("activations", 0.03)
    assert both.low > alone.high


def test_the_reason_gives_the_range_in_words() -> None:
    for each in (forecast(0.5), forecast(3.0), forecast(1.0, 0.01), forecast(1.0, 1.3)):
        assert f"{each.low:.0f} to {each.high:.0f} %" in each.reason
    assert "should work" in forecast(1.0, 0.01).reason
    assert "fine-tune the target itself" in forecast(1.0, 1.3).reason
    assert "3 times as far" in forecast(3.0).reason
    assert "differ from base's by 2% on average" in forecast(1.0, 0.02).reason
    assert "score one with a few alphas" in forecast(1.0, 0.15).reason


@pytest.mark.parametrize("basis", RULES)
def test_the_record_travels_along(basis: str) -> None:
    told = json.loads(json.dumps(at(basis, 0.3).as_json(), allow_nan=False))
    assert {"low", "high", "ratio", "basis", "reason", "record"} <= told.keys()
    assert told["ratio"] == 0.3
    record = told["record"]
    assert record["families"] >= 2
    assert record["settings"] >= 20
    assert 0 < record["spearman"] <= 1
    assert 0 < record["inside"] <= 100
    assert "larger models may differ" in record["remark"]


def test_weights_alone_are_trusted_less_where_their_record_is_worse() -> None:
    by_weights, by_activations = RULES["weights"].record, RULES["activations"].record
    if by_weights.mean_error > by_activations.mean_error:
        assert by_weights.mean_width > by_activations.mean_width


def test_a_layer_of_zeros_says_nothing() -> None:
    unknown = forecast(1.0, math.inf)
    assert (unknown.low, unknown.high) == (0, 100)
    assert "Nothing can be said" in unknown.reason
    assert unknown.as_json()["ratio"] is None


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((math.nan,), "weight ratio: expected a number of at least 0, found nan"),
        ((-1.0,), "weight ratio: expected a number of at least 0, found -1.0"),
        ((1.0, math.nan), "activation ratio: expected"),
        ((math.inf,), "diff vector: is 0"),
        ((math.inf, 0.1), "diff vector: is 0"),
    ],
)
def test_what_is_no_ratio_is_refused_in_a_line(ratios: tuple[float, ...], message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        forecast(*ratios)
    assert "\n" not in str(caught.value)
