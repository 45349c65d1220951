"""A summary of an evaluation in sentences that claim no more than the scores support."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffxfer.evaluation.score_text import chance_text, number_text, share_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.evaluation.scores import Evaluation, MetricKey, Row

SIGNIFICANCE = 0.05
"""A difference with a smaller p-value is considered significant."""


def measure_name(column: MetricKey) -> str:
    """A task with its metric, and its filter if there is one.

    Args:
        column: task, metric and filter.
    """
    task, metric, chosen = column
    return f"{task}: {metric}" + ("" if chosen == "none" else f" ({chosen})")


def row_name(row: Row, names: Mapping[str, str]) -> str:
    """The name of a model or a graft.

    Args:
        row: one of its scores.
        names: short names of the models.
    """
    name = names[row.model]
    return name if row.alpha is None else f"{name} + {row.alpha!r}·Δ"


def summarize(evaluation: Evaluation, names: Mapping[str, str]) -> list[str]:
    """Compare the best model of each metric with the baseline.

    Args:
        evaluation: the scores.
        names: short names of its models.

    Returns:
        One line for each requested metric; then the best alpha, if several were scored.
    """
    lines = [_line(evaluation, column, names) for column in evaluation.columns]
    best = evaluation.best
    if best is not None:
        value = f"{best.metric} {number_text(best.value)}"
        lines.append(f"The best alpha on {best.task} is {best.alpha!r} ({value}).")
    return lines or ["Nothing was scored."]


def _line(evaluation: Evaluation, column: MetricKey, names: Mapping[str, str]) -> str:
    rows = [row for row in evaluation.rows if row.column == column]
    task, metric, chosen = column
    said = f"{task} ({metric}" + ("): " if chosen == "none" else f", {chosen}): ")
    candidates = [row for row in rows if _is_candidate(row, evaluation)]
    sound = [row for row in candidates if math.isfinite(row.value)]
    better = sound[0].higher_is_better if sound else None
    if better is None:
        said += ", ".join(f"{row_name(row, names)} scores {number_text(row.value)}" for row in rows)
        unknown = " It is not known whether higher is better." if sound else ""
        return f"{said}.{unknown}"
    best = (max if better else min)(sound, key=lambda row: row.value)
    if len(sound) > 1:
        grafts = all(row.alpha is not None for row in sound)
        said += f"the best {'graft' if grafts else 'of them'}, {row_name(best, names)},"
    else:
        said += row_name(best, names)
    return f"{said} scores {number_text(best.value)}{_against(best, names)}."


def _is_candidate(row: Row, evaluation: Evaluation) -> bool:
    """Whether a score is of a model that may improve on the baseline, such as a graft."""
    references = (evaluation.baseline, evaluation.finetuned)
    return row.alpha is not None or row.model not in references


def _against(row: Row, names: Mapping[str, str]) -> str:
    """The comparison of a score with the baseline, and the recovered share."""
    if row.delta is None:
        return ""
    baseline = names[row.baseline]
    gain = row.delta if row.higher_is_better else -row.delta
    tested = "" if row.p_value is None else f" ({chance_text(row.p_value)})"
    if gain == 0:
        found = f", the same as {baseline}"
    else:
        way = "better" if gain > 0 else "worse"
        found = f", which is {number_text(abs(gain))} {way} than {baseline}{tested}"
        if row.p_value is not None and row.p_value >= SIGNIFICANCE:
            found += " and may be chance"
    if row.recovered is None or row.recovered < 0 or gain <= 0:
        return found
    recovered = share_text(row.recovered, row.recovered_interval)
    return f"{found}; it {recovered} of direct fine-tuning's gain"


def unclear(rows: Sequence[Row]) -> bool:
    """Whether some differences may be chance.

    Args:
        rows: scores, compared with a baseline.
    """
    return any(row.p_value is not None and row.p_value >= SIGNIFICANCE for row in rows)
