"""A summary of a chain in sentences that claim no more than the scores support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.recycling.chain_report import format_value

if TYPE_CHECKING:
    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.chain_report import ChainReport, Round

_SIGNIFICANCE = 0.05
"""A difference with a smaller p-value is considered significant."""
_LOST = "Not recovered"
_BETTER = "Better than the base"
_MADE = {"graft": "the graft", "tuned": "the graft that was tuned further"}
_NO_SCORES = (
    "Nothing was scored, since the recipe has no eval part: it is not known whether the fine-tuning"
    " carried over."
)


def summarize(report: ChainReport) -> list[str]:
    """Compare the graft of the last round with the other models that were scored.

    Args:
        report: the result of the chain.

    Returns:
        One line for each measure and each graft or tuned graft; the first line is about the first
        requested measure.
    """
    last = report.rounds[-1]
    found = [
        (stage, measure)
        for measure in report.measures
        for stage in _MADE
        if last.row(stage, measure) is not None
    ]
    if not found:
        return [_NO_SCORES]
    return [_first_line(last, *found[0]), *(_further_line(last, *each) for each in found[1:])]


def _first_line(last: Round, stage: str, measure: MetricKey) -> str:
    alpha = "" if last.alpha is None else f" at alpha {last.alpha:g}"
    outcome, figures = _outcome(last, stage, measure)
    what = f"{_MADE[stage]} on {last.base}{alpha} {figures}"
    return f"{outcome} on {_named(measure)}: {what}."


def _further_line(last: Round, stage: str, measure: MetricKey) -> str:
    outcome, figures = _outcome(last, stage, measure)
    # Fine-tuning need not have taught what other tasks measure.
    outcome = "No better than the base" if outcome == _LOST else outcome
    return f"{outcome} on {_named(measure)}: {_MADE[stage]} {figures}."


def _named(measure: MetricKey) -> str:
    task, metric, chosen = measure
    return f"{task} ({metric}" + (")" if chosen == "none" else f", {chosen})")


def _outcome(last: Round, stage: str, measure: MetricKey) -> tuple[str, str]:
    """The outcome for a model, and its score beside those of the other models."""
    row, base, direct = (last.row(column, measure) for column in (stage, "base", "direct"))
    assert row is not None
    scores = f"scores {format_value(row)}"
    if base is None:
        nothing = "the base alone was not scored to compare it with"
        return "Not known whether it helped", f"{scores}; {nothing}"
    outcome, remark = _compare(row, base, direct)
    scores += f", the base alone {format_value(base)}"
    if direct is not None:
        scores += f", the base tuned plainly {format_value(direct)}"
    return outcome, f"{scores}; {remark}"


def _compare(
    row: dict[str, Any], base: dict[str, Any], direct: dict[str, Any] | None
) -> tuple[str, str]:
    """The outcome against the base, and the difference."""
    better = row["higher_is_better"]
    if better is None or None in (row["value"], base["value"]):
        return "Not known whether it helped", (
            "lm-eval does not say whether higher is better"
            if better is None
            else "a score is not a number"
        )
    gain = _gain(row, base)
    p_value = row.get("p_value") if row.get("baseline") == "base" else None
    chance = "" if p_value is None else f" ({_chance(p_value)})"
    if gain <= 0:
        how = "no better" if gain == 0 else f"{abs(gain):.4f} worse"
        return _LOST, f"that is {how} than the base{chance}"
    if p_value is not None and p_value >= _SIGNIFICANCE:
        return "Not shown to help", f"a gain of {gain:.4f}{chance} may be chance"
    return _share(row, base, direct, f"a gain of {gain:.4f}{chance}")


def _gain(row: dict[str, Any], base: dict[str, Any]) -> float:
    """The gain over the base, positive if the model is better."""
    return float(row["value"] - base["value"]) * (1 if row["higher_is_better"] else -1)


def _share(
    row: dict[str, Any], base: dict[str, Any], direct: dict[str, Any] | None, gain: str
) -> tuple[str, str]:
    """The recovered share of the gain of direct fine-tuning, for a model better than the base."""
    if direct is None:
        return _BETTER, (
            f"{gain}; the share of plain tuning's gain is not known, since controls has no direct"
        )
    share = row.get("recovered")
    if share is None:
        if None not in (direct["value"], base["value"]) and _gain(direct, base) <= 0:
            return (
                _BETTER,
                f"{gain}; plain tuning gains nothing over the base, so there is no share of it",
            )
        notes = "; ".join(row.get("notes", ()))
        why = f": {notes}" if notes else " can be given"
        return _BETTER, f"{gain}; no share of plain tuning's gain{why}"
    interval = row.get("recovered_interval")
    span = "" if interval is None else f"; 95 % interval {_percent(*interval)} %"
    return f"Recovered {_percent(share)} % of plain tuning's gain", f"{gain}{span}"


def _percent(*shares: float) -> str:
    return " to ".join(f"{100 * share:.0f}" for share in shares)


def _chance(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
