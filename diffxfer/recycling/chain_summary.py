"""What came out of a chain, in plain sentences that claim no more than was scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.recycling.chain_report import format_value

if TYPE_CHECKING:
    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.chain_report import ChainReport, Round

_SIGNIFICANCE = 0.05
"""Below this p-value a difference is not taken for chance."""
_LOST = "Not recovered"
_BETTER = "Better than the base"
_MADE = {"graft": "the graft", "tuned": "the graft that was tuned further"}
_NO_SCORES = (
    "Nothing was scored, since the recipe has no eval part: whether the fine-tuning carried over is"
    " not known."
)


def summarize(report: ChainReport) -> list[str]:
    """What the last round's graft is worth, beside the models that were scored with it.

    Args:
        report: what a chain came to.

    Returns:
        One line for each measure and each model made; the first one, a whole sentence, is on the
        graft and the measure that was asked for first.
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
    # What other tasks measure need not be what fine-tuning taught.
    outcome = "No better than the base" if outcome == _LOST else outcome
    return f"{outcome} on {_named(measure)}: {_MADE[stage]} {figures}."


def _named(measure: MetricKey) -> str:
    task, metric, chosen = measure
    return f"{task} ({metric}" + (")" if chosen == "none" else f", {chosen})")


def _outcome(last: Round, stage: str, measure: MetricKey) -> tuple[str, str]:
    """In a word what a model that was made is worth, and its score beside those of others."""
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
    """In a word whether it helped, and by how much."""
    better = row["higher_is_better"]
    if better is None or None in (row["value"], base["value"]):
        return "Not known whether it helped", (
            "lm-eval does not say which way is better" if better is None else "one is no number"
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
    """By how much a model is better than the base."""
    return float(row["value"] - base["value"]) * (1 if row["higher_is_better"] else -1)


def _share(
    row: dict[str, Any], base: dict[str, Any], direct: dict[str, Any] | None, gain: str
) -> tuple[str, str]:
    """How much of what plain tuning gains a better model recovers."""
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
