"""How much of direct fine-tuning's gain a graft may recover, before anything is trained.

Recovery is (graft − target) / (direct − target): the graft's score at the best alpha, between that
of the target alone and that of a target that was fine-tuned itself. Two numbers foretell it
without a task: how far the target's weights are from base's, next to the size of the diff vector,
and how much the target's layers change what base's layers compute on some text (the better one).
The rule and its record are in `forecast_rule`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.errors import EvaluationError
from diffxfer.probing.forecast_rule import RULES

if TYPE_CHECKING:
    from diffxfer.probing.forecast_rule import Record, Rule

CLOSE, FAR = 80.0, 20.0
"""A whole range above `CLOSE` means that a graft should work, one below `FAR` that it should not,
both in % of direct fine-tuning's gain."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a graft may recover of direct fine-tuning's gain, at the best alpha.

    Attributes:
        low: the lower end of the range, in %.
        high: its upper end, in %.
        expected: a single figure within it, in %.
        ratio: what the forecast is made of.
        basis: what `ratio` is: ``"activations"`` for ‖(T − B)x‖ / ‖Bx‖, ``"weights"`` for
            ‖target − base‖ / ‖Δ‖.
        reason: why, for someone who has not read the papers.
        record: how well such forecasts agreed with measurements.
    """

    low: float
    high: float
    expected: float
    ratio: float
    basis: str
    reason: str
    record: Record

    def as_json(self) -> dict[str, Any]:
        """The forecast as plain data; a ratio that is not finite is None."""
        return {
            "low": self.low,
            "high": self.high,
            "expected": self.expected,
            "ratio": self.ratio if math.isfinite(self.ratio) else None,
            "basis": self.basis,
            "reason": self.reason,
            "record": asdict(self.record),
        }


def forecast(weight_ratio: float, activation_ratio: float | None = None) -> Forecast:
    """Forecast what a graft may recover.

    Args:
        weight_ratio: ‖target − base‖ / ‖Δ‖, over all parameters.
        activation_ratio: the mean of `activation_ratio`; where it is given, the forecast is made
            of it alone.

    Returns:
        A range in %. It is 0 to 100 where the activation ratio is infinite, which says nothing.

    Raises:
        EvaluationError: if the diff vector is 0, or a ratio is no number or negative.
    """
    _check("weight", weight_ratio)
    if math.isinf(weight_ratio):
        raise EvaluationError(
            "diff vector",
            "is 0: finetuned equals base, so there is nothing to graft",
            "give a fine-tune of base",
        )
    basis, ratio = "weights", weight_ratio
    if activation_ratio is not None:
        _check("activation", activation_ratio)
        basis, ratio = "activations", activation_ratio
    rule = RULES[basis]
    low, expected, high = (0.0, 50.0, 100.0) if math.isinf(ratio) else _look_up(rule, ratio)
    reason = _reason(basis, ratio, low, high, rule)
    return Forecast(low, high, expected, ratio, basis, reason, rule.record)


def _check(which: str, ratio: float) -> None:
    if math.isnan(ratio) or ratio < 0:
        raise EvaluationError(
            f"{which} ratio",
            f"expected a number of at least 0, found {ratio}",
            "check that no weight of base, finetuned or target is NaN",
        )


def _look_up(rule: Rule, ratio: float) -> tuple[float, float, float]:
    """Low, expected and high: straight lines over the logarithm of the ratio."""
    knots = rule.knots
    after = bisect_right([knot.ratio for knot in knots], ratio)
    if after in (0, len(knots)):
        knot = knots[max(after - 1, 0)]
        return knot.low, knot.expected, knot.high
    left, right = knots[after - 1], knots[after]
    share = math.log(ratio / left.ratio) / math.log(right.ratio / left.ratio)
    low, expected, high = (
        round(a + share * (b - a), 1)
        for a, b in (
            (left.low, right.low),
            (left.expected, right.expected),
            (left.high, right.high),
        )
    )
    return low, expected, high


def _reason(basis: str, ratio: float, low: float, high: float, rule: Rule) -> str:
    if math.isinf(ratio):
        return "Nothing can be said: a layer of base computes only zeros on this text."
    what = (
        f"On the same text, the target's layers give results that differ from base's by "
        f"{ratio:.0%} on average."
        if basis == "activations"
        else f"The target's weights are {ratio:.2g} times as far from base's as the fine-tuned "
        "model's are."
    )
    if low >= CLOSE:
        so = "The target is close to base, so the diff vector should work on it as it did on base."
    elif high <= FAR:
        so = (
            "The target is so far from base that the diff vector means little or nothing to it: "
            "fine-tune the target itself."
        )
    else:
        so = (
            "At this distance some grafts worked and others did not: score one with a few alphas "
            "before you rely on it."
        )
    seen = (
        f"The rule, fixed on {rule.settings} trained settings, expects {low:.0f} to {high:.0f} %"
        " of what direct fine-tuning gains at this distance."
    )
    smallest, largest = rule.knots[0].ratio, rule.knots[-1].ratio
    if not smallest <= ratio <= largest:
        seen += f" No setting was measured {'closer' if ratio < smallest else 'farther'} than that."
    return f"{what} {seen} {so}"
