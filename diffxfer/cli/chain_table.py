"""A chain as tables: one row per round, one column per model, like table 6 of Lin et al. 2025."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from diffxfer.cli.console import PIPE_WIDTH
from diffxfer.errors import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.chain_report import ChainReport


def print_chain(report: ChainReport) -> None:
    """Print the scores of each round, one table per measure.

    Args:
        report: the chain; without scores nothing is printed.
    """
    from rich.console import Console

    # Output to a pipe or file is not folded to a terminal's width.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    out = Console(highlight=False, width=width)
    for number, measure in enumerate(report.measures):
        if number:
            out.print()
        out.print(_table(report, measure))


def _table(report: ChainReport, measure: MetricKey) -> Table:
    from rich.table import Table
    from rich.text import Text

    task, metric, chosen = map(printable, measure)
    title = f"{task}, {metric}" + ("" if chosen == "none" else f", {chosen}")
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    columns = report.columns()
    for heading in ("round", "base model", "alpha"):
        table.add_column(heading)
    for column in columns:
        table.add_column(column, justify="right")
    for each in report.rounds:
        rows = [each.row(column, measure) for column in columns]
        best = each.best(measure)
        alpha = "" if each.alpha is None else f"{each.alpha:g}"
        first = (str(each.number), printable(each.base), alpha)
        cells = [Text(text, overflow="fold") for text in first]
        table.add_row(*cells, *(_cell(row, best) for row in rows))
    return table


def _cell(row: dict[str, Any] | None, best: float | None) -> Text:
    from rich.text import Text

    from diffxfer.recycling.chain_report import format_value

    if row is None:
        return Text("")
    wins = best is not None and row["value"] == best
    cell = Text(format_value(row), "bold" if wins else "")
    if row["stderr"] is not None:
        cell.append(f" ± {row['stderr']:.4f}", "not bold")
    return cell
