"""The report of a chain as a page with tables and plots.

The page is meant to be shared, so it has no local paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.pages.local_paths import without_folders
from diffxfer.pages.page import Cell, Page
from diffxfer.recycling.chain_plots import STAGE_NAMES, losses_figure, scores_figure
from diffxfer.recycling.chain_report import format_value
from diffxfer.recycling.chain_summary import summarize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.chain_report import ChainReport


_SCORES = (
    "each round moves the fine-tuning onto a newer base, and may train it further. A graft above"
    " its base alone has carried it over; a tuned graft above the base that was tuned plainly was"
    " the better start. Vertical bars are standard errors."
)
_LOSSES = (
    "the loss is how far the model is from the training data while it is trained; lower is closer."
    " A curve that begins lower belongs to a model that knew more of the task at the start."
)


def write_page(report: ChainReport, path: Path, *, home: Path | None = None) -> None:
    """Write the page of a chain.

    Args:
        report: the result of the chain.
        path: the file to write, atomically.
        home: the folder of the recipe; paths in it are shown relative to it.

    Raises:
        OutputError: if the file cannot be written.
    """
    import yaml

    page = Page(f"Chain of {len(report.rounds)} bases")
    page.verdict(summarize(report))
    bases = " → ".join(each.base for each in report.rounds)
    page.paragraph(f"{bases}; mode {report.recipe.get('mode', 'iter')}")
    for measure in report.measures:
        page.heading(_title(measure))
        heads = ("round", *(STAGE_NAMES[column] for column in report.columns()))
        page.table(heads, _rows(report, measure), _caption(report, measure))
        page.figure(scores_figure(report, measure))
        page.explain(_SCORES)
    losses = losses_figure(report)
    if losses is not None:
        page.heading("Training loss")
        page.figure(losses)
        page.explain(_LOSSES)
    if report.warnings:
        page.heading("Warnings")
        page.bullets(without_folders(warning, report.run, home) for warning in report.warnings)
    recipe = _map_texts(report.recipe, lambda text: without_folders(text, report.run, home))
    page.heading("Recipe")
    page.preformatted(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    page.write(path)


def _map_texts(value: Any, change: Any) -> Any:
    """Apply a function to every string in a nested value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    return [_map_texts(inner, change) for inner in value] if isinstance(value, list) else value


def _rows(report: ChainReport, measure: MetricKey) -> Iterator[list[Cell]]:
    """The rows of one measure's table, one per round."""
    for each in report.rounds:
        best = each.best(measure)
        alpha = "" if each.alpha is None else f" alpha {each.alpha:g}"
        cells = [_cell(each.row(column, measure), best) for column in report.columns()]
        yield [Cell(f"{each.number}. {each.base}", alpha), *cells]


def _caption(report: ChainReport, measure: MetricKey) -> str:
    """The caption: whether higher is better, and the meaning of ±."""
    found = (each.row(column, measure) for each in report.rounds for column in report.columns())
    rows = [row for row in found if row is not None]
    said = []
    if rows and rows[0]["higher_is_better"] is not None:
        said.append("higher is better" if rows[0]["higher_is_better"] else "lower is better")
    if any(row["stderr"] is not None for row in rows):
        said.append("± standard error")
    return "; ".join(said)


def _cell(row: dict[str, Any] | None, best: float | None) -> Cell:
    if row is None:
        return Cell("")
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    return Cell(format_value(row), stderr, best is not None and row["value"] == best)


def _title(measure: MetricKey) -> str:
    task, metric, chosen = measure
    return f"{task}: {metric}" + ("" if chosen == "none" else f" ({chosen})")
