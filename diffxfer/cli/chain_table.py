"""A chain as tables: one row per round, one column per model, like table 6 of Lin et al. 2025."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.cli.table import add_columns, folded, make_table, stdout

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
    out = stdout()
    for number, measure in enumerate(report.measures):
        if number:
            out.print()
        out.print(_table(report, measure))


def _table(report: ChainReport, measure: MetricKey) -> Table:
    task, metric, chosen = measure
    table = make_table(title=f"{task}, {metric}" + ("" if chosen == "none" else f", {chosen}"))
    columns = report.columns()
    add_columns(table, "round", "base model", "alpha")
    add_columns(table, *columns, numbers=True)
    for each in report.rounds:
        rows = [each.row(column, measure) for column in columns]
        best = each.best(measure)
        alpha = "" if each.alpha is None else f"{each.alpha:g}"
        first = (str(each.number), each.base, alpha)
        table.add_row(*map(folded, first), *(_cell(row, best) for row in rows))
    return table


def _cell(row: dict[str, Any] | None, best: float | None) -> Text:
    from rich.text import Text

    from diffxfer.recycling.chain_report import format_value

    if row is None:
        return Text("")
    wins = best is not None and row["value"] == best
    found = Text(format_value(row), "bold" if wins else "")
    if row["stderr"] is not None:
        found.append(f" ± {row['stderr']:.4f}", "not bold")
    return found
