"""The report of an evaluation as a page with tables and plots.

The page is meant to be shared, so it has no local paths.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.evaluation.eval_summary import measure_name, row_name, summarize, unclear
from diffxfer.evaluation.score_text import (
    best_value,
    chance_text,
    number_text,
    share_text,
    short_names,
)
from diffxfer.pages.charts import Bar, Curve, bars, curves
from diffxfer.pages.local_paths import without_folders
from diffxfer.pages.page import Cell, Page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from plotly.graph_objects import Figure

    from diffxfer.evaluation.scores import Evaluation, MetricKey, Row

REPORT = "report.html"
_Z = 1.959963984540054
"""Standard errors on either side of a value in its 95 % interval."""
_WAYS = {True: "higher is better", False: "lower is better", None: ""}
_COLOURS = {"graft": "#D98E00", "target": "#8A8A8A", "finetuned": "#009E73"}


def write_page(evaluation: Evaluation, path: Path) -> None:
    """Write the page of an evaluation.

    Args:
        evaluation: the scores.
        path: the file to write, atomically.

    Raises:
        OutputError: if the file cannot be written.
    """
    also = (evaluation.target, evaluation.baseline, evaluation.finetuned or evaluation.target)
    names = short_names([*(row.model for row in evaluation.rows), *also])
    page = Page(f"Scores of {names[evaluation.target]}" + _others(evaluation))
    page.verdict(summarize(evaluation, names))
    said = ""
    for column in evaluation.columns:
        said = _add_measure(page, evaluation, column, names, said)
    if evaluation.best is not None:
        page.heading("The command that writes the best graft")
        page.preformatted(_without_paths(evaluation.best.command, evaluation))
    if evaluation.warnings:
        page.heading("Warnings")
        page.bullets(_without_paths(warning, evaluation) for warning in evaluation.warnings)
    page.write(path)


def _others(evaluation: Evaluation) -> str:
    grafts = len({row.alpha for row in evaluation.rows if row.alpha is not None})
    if grafts:
        return f" and its grafts at {grafts} alphas" if grafts > 1 else " and its graft"
    others = len({row.model for row in evaluation.rows} - {evaluation.target})
    return f" and {others} more model{'s' * (others > 1)}" if others else ""


def _without_paths(text: str, evaluation: Evaluation) -> str:
    return without_folders(text, evaluation.output or Path(), None)


def _add_measure(
    page: Page, evaluation: Evaluation, column: MetricKey, names: Mapping[str, str], said: str
) -> str:
    """Add one metric; what its table means is returned, and not said again below the next one."""
    rows = [row for row in evaluation.rows if row.column == column]
    page.heading(measure_name(column))
    page.table(_heads(rows, names), _cells(evaluation, rows, names), _caption(rows))
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    if notes:
        page.bullets(_without_paths(note, evaluation) for note in notes)
    meaning = _table_meaning(evaluation, rows, names)
    if meaning not in said:
        page.explain(meaning)
    figure = alpha_figure(evaluation, rows, names)
    if figure is not None:
        page.figure(figure)
        page.explain(_ALPHAS + (_INTERVAL.format("shaded part") if _has_intervals(rows) else ""))
    elif len(rows) > 1:
        page.figure(_models_figure(evaluation, rows, names))
        interval = _INTERVAL.format("thin line") if _has_intervals(rows) else ""
        page.explain(f"each bar is a model's score.{interval}")
    return said + meaning


_ALPHAS = (
    "alpha is how much of the fine-tuning is added to the target: 0 is the target as it is, 1 adds"
    " all of it. The dashed lines are the models that the grafts are compared with."
)
_INTERVAL = (
    " The {} is the 95 % confidence interval, ± 1.96 standard errors: how far off the score may be"
    " because the number of questions is limited."
)


def _has_intervals(rows: Sequence[Row]) -> bool:
    return any(row.stderr is not None for row in rows)


def _heads(rows: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    heads = ["model", "score"]
    if any(row.delta is not None for row in rows):
        heads += [f"difference from {names[rows[0].baseline]}", "p"]
    return [*heads, "recovered"] if any(row.recovered is not None for row in rows) else heads


def _cells(
    evaluation: Evaluation, rows: Sequence[Row], names: Mapping[str, str]
) -> list[list[Cell]]:
    best, width = best_value(rows), len(_heads(rows, names))
    lines = []
    for row in rows:
        wins = best is not None and math.isclose(row.value, best, rel_tol=1e-9)
        stderr = "" if row.stderr is None else f" ± {number_text(row.stderr)}"
        delta = "" if row.delta is None else number_text(row.delta, "+")
        tested = "" if row.p_value is None else chance_text(row.p_value)
        found = row.recovered
        recovered = "" if found is None else share_text(found, row.recovered_interval)
        line = [
            Cell(row_name(row, names), _role(row, evaluation)),
            Cell(number_text(row.value), stderr, wins),
        ]
        more = [Cell(delta), Cell(tested), Cell(recovered.removeprefix("recovers "))]
        lines.append([*line, *more[: width - 2]])
    return lines


def _role(row: Row, evaluation: Evaluation) -> str:
    if row.alpha is not None:
        return ""
    roles = {"baseline": evaluation.baseline, "finetuned": evaluation.finetuned}
    return "".join(f" {role}" for role, label in roles.items() if label == row.model)


def _caption(rows: Sequence[Row]) -> str:
    counts = sorted({row.n for row in rows})
    said = [_WAYS[rows[0].higher_is_better]] if rows else []
    said.append("n = " + " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))))
    if _has_intervals(rows):
        said.append("± standard error")
    return "; ".join(filter(None, said))


def _table_meaning(evaluation: Evaluation, rows: Sequence[Row], names: Mapping[str, str]) -> str:
    said = ["all models answered the same questions."]
    if any(row.p_value is not None for row in rows):
        said.append(
            "p is the probability of a difference this large if the two models were equally good"
            " (McNemar's exact test or sign-flip permutation, question by question)."
        )
    if unclear(rows):
        said.append("Where p is 0.05 or more, the difference may be chance.")
    if any(row.recovered is not None for row in rows):
        direct, target = names[evaluation.finetuned or evaluation.target], names[evaluation.target]
        said.append(
            f"Recovered is the share of {direct}'s gain over {target} that a model has, with its"
            " 95 % interval: 100 % is as good as direct fine-tuning."
        )
    return " ".join(said)


def alpha_figure(
    evaluation: Evaluation, rows: Sequence[Row], names: Mapping[str, str]
) -> Figure | None:
    """Plot score against alpha, with 95 % intervals; None if fewer than two alphas were scored.

    Args:
        evaluation: the scores.
        rows: those by one metric.
        names: short names of the models.
    """
    grafts = sorted((row for row in rows if row.alpha is not None), key=lambda row: row.alpha or 0)
    if len(grafts) < 2:
        return None
    alphas = [row.alpha or 0.0 for row in grafts]
    ends = [min(0.0, *alphas), max(alphas)]
    drawn = []
    for role in ("target", "finetuned"):
        found = [r for r in rows if r.alpha is None and r.model == getattr(evaluation, role)]
        for row in found[:1]:
            name = names[row.model] + (
                " (the target)" if role == "target" else " (fine-tuned directly)"
            )
            drawn.append(Curve(name, ends, [row.value] * 2, "dashed", _COLOURS[role]))
    low, high = zip(*map(_interval, grafts), strict=True)
    drawn.append(
        Curve(
            f"{names[grafts[0].model]} + alpha · Δ",
            alphas,
            [row.value for row in grafts],
            colour=_COLOURS["graft"],
            low=low if _has_intervals(grafts) else None,
            high=high if _has_intervals(grafts) else None,
        )
    )
    return curves(drawn, x="alpha", y=_axis(rows[0]))


def _models_figure(evaluation: Evaluation, rows: Sequence[Row], names: Mapping[str, str]) -> Figure:
    """Plot the score of each model, with 95 % intervals."""
    roles = {evaluation.finetuned: "finetuned", evaluation.target: "target"}
    drawn = [
        Bar(
            row_name(row, names),
            row.value,
            *_interval(row),
            _COLOURS["graft"]
            if row.alpha is not None
            else _COLOURS.get(roles.get(row.model, ""), ""),
        )
        for row in rows
    ]
    return bars(drawn, x=_axis(rows[0]))


def _axis(row: Row) -> str:
    way = _WAYS[row.higher_is_better]
    return row.metric + (f" ({way})" if way else "")


def _interval(row: Row) -> tuple[float | None, float | None]:
    """The 95 % interval of a score by its standard error."""
    if row.stderr is None or not math.isfinite(row.value):
        return None, None
    return row.value - _Z * row.stderr, row.value + _Z * row.stderr
