"""What a probe found, in sentences for someone who has not read the papers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.probing.forecast import Forecast
    from diffxfer.probing.paths import MeasuredPath, SkippedPath
    from diffxfer.probing.report import ProbeReport
    from diffxfer.probing.scoring import ScoredPoint

BETTER = (
    "This forecast is made of weights alone. --forward lets base read a text, for a better one;"
    " --data or --tasks measure the graft itself."
)
MEANINGS = {
    "forecast": "100 % means that a graft is as good as fine-tuning the target itself, 0 % that it"
    " is no better than the target. The record says how often such forecasts were right.",
    "distances": "The shift is what the successor changed, Δ what fine-tuning changed. A shift that"
    " is small next to Δ leaves the fine-tuning valid. A cosine of 0 between Δ and the shift means"
    " that they are independent, which is usual.",
    "paths": "Models between two models are made by mixing their weights. If the loss stays low all"
    " the way, the two are variants of one solution, and what one learned fits the other. The"
    " control is the same model with its units in another order: it computes the same, but its"
    " weights match nothing, so its barrier shows what unrelated weights look like.",
    "alphas": "alpha is how much of the fine-tuning is added: 0 is the target as it is.",
    "attention": "Each head of a model looks at some tokens. 1 means that corresponding heads look"
    " at the same ones. Compare it with the baselines: other heads of the layer, equal attention to"
    " all tokens, and a permuted copy of the second model.",
    "hidden": "CKA says how similar the internal states of two models are, layer by layer: 1 is the"
    " same up to rotation and scale. The baseline compares different tokens.",
    "agreement": "How often two models predict the same on the same rows. No label is used.",
}
"""What each part means."""


def summarize(report: ProbeReport) -> list[str]:
    """The most important statements, the forecast first.

    Args:
        report: what was measured.
    """
    lines = []
    found: Forecast | None = report.forecast
    if found is None:
        lines.append("There is no forecast: the diff vector is 0, or a weight is not finite.")
    else:
        lines.append(
            f"A graft may recover {found.low:.0f} to {found.high:.0f} % of what fine-tuning the"
            " target itself would gain, at the best alpha."
        )
        lines += [found.reason, record_line(found)]
    lines += _measured(report.alphas or ())
    lines += _barriers(report.paths or ())
    if found is not None and found.basis == "weights":
        lines.append(BETTER)
    return lines


def record_line(found: Forecast) -> str:
    """How well such forecasts agreed with measurements.

    Args:
        found: the forecast.
    """
    record = found.record
    return (
        f"Record: on {record.settings} settings of {record.families} families that the rule had not"
        f" seen, {record.inside:.0f} % lay within the range, the single figure was off by"
        f" {record.mean_error:.0f} points on average, and Spearman's correlation with recovery was"
        f" {record.spearman:.2f}. {record.remark}"
    )


def plain_ends(path: MeasuredPath | SkippedPath) -> tuple[str, str]:
    """The ends of a path, or of the path that it is the control of.

    Args:
        path: the path.
    """
    return path.ends[0], path.ends[1].removesuffix(" permuted")


def path_name(path: MeasuredPath | SkippedPath) -> str:
    """A path in words.

    Args:
        path: the path.
    """
    ends = " to ".join(plain_ends(path))
    return f"{ends}, control" if path.control else ends


def _measured(points: Sequence[ScoredPoint]) -> list[str]:
    """What the graft recovers of direct's gain, measured: by the first score, or the loss."""
    named = {point.model: point for point in points if point.alpha is None}
    grafts = [point for point in points if point.alpha is not None]
    if not grafts or "direct" not in named:
        return []
    values = {id(point): _value(point) for point in points}
    low, high = values[id(named["target"])], values[id(named["direct"])]
    known = [(point, value) for point in grafts if (value := values[id(point)]) is not None]
    if low is None or high is None or low == high or not known:
        return []
    best, value = max(known, key=lambda each: (each[1] - low) / (high - low))
    share = (value - low) / (high - low)
    what = best.scores[0]["task"] if best.scores else "the loss on the rows"
    return [
        f"Measured on {what}: the graft at alpha {best.alpha:g} recovers {share:.0%} of direct's"
        " gain."
    ]


def _value(point: ScoredPoint) -> float | None:
    if point.scores:
        value: float | None = point.scores[0]["value"]
        return value
    return point.loss


def _barriers(paths: Sequence[Any]) -> list[str]:
    """The barrier of each path, beside that of its control."""
    measured = [path for path in paths if hasattr(path, "barrier")]
    controls = {plain_ends(path): path for path in measured if path.control}
    lines = []
    for path in measured:
        if path.control:
            continue
        beside = controls.get(plain_ends(path))
        than = "" if beside is None else f"; its control has {beside.barrier:.2f}"
        lines.append(
            f"Between {path.ends[0]} and {path.ends[1]} the loss rises by {path.barrier:.2f} nats"
            f" above the straight line{than}."
        )
    return lines
