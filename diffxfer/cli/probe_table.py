"""Printing what a probe measured with models in memory, and the forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.cli.table import add_columns, folded, make_table, stdout
from diffxfer.probing.probe_text import MEANINGS, path_name, summarize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from diffxfer.probing.report import ProbeReport


def print_measured(report: ProbeReport) -> None:
    """Print the tables of a probe, and its forecast last.

    Args:
        report: what was measured.
    """
    from rich.text import Text

    out = stdout()
    for title, part, table in (
        ("the graft, measured", "alphas", _alphas(report)),
        ("loss between two models", "paths", _paths(report)),
        ("attention of corresponding heads, cosine", "attention", _attention(report)),
        ("agreement of predictions", "agreement", _agreement(report)),
    ):
        if table is not None:
            _print(out, title, table, MEANINGS[part])
    out.print(Text("\nforecast", "bold"))
    for line in summarize(report):
        out.print(folded(line))


def _print(out: Console, title: str, table: Table, meaning: str) -> None:
    from rich.text import Text

    out.print(Text(f"\n{title}", "bold"))
    out.print(table)
    out.print(folded(meaning), style="dim")


def _alphas(report: ProbeReport) -> Table | None:
    if not report.alphas:
        return None
    table = make_table()
    add_columns(table, "model")
    first = report.alphas[0]
    heads = [] if first.loss is None else ["loss", "tokens right"]
    heads += [f"{score['task']} {score['metric']}" for score in first.scores]
    add_columns(table, *heads, numbers=True)
    for point in report.alphas:
        name = point.model if point.alpha is None else f"graft, alpha {point.alpha:g}"
        cells = [] if point.loss is None else [f"{point.loss:.4f}", f"{point.accuracy:.1%}"]
        values = [score["value"] for score in point.scores]
        cells += ["–" if value is None else f"{value:.4f}" for value in values]
        table.add_row(folded(name), *cells)
    return table


def _paths(report: ProbeReport) -> Table | None:
    if not report.paths:
        return None
    table = make_table()
    add_columns(table, "path")
    add_columns(table, "barrier", "95 % interval", "loss of the ends", numbers=True)
    for path in report.paths:
        name = path_name(path)
        if not hasattr(path, "points"):
            table.add_row(folded(f"{name}: left out, since {path.reason}"), "", "", "")
            continue
        interval = path.interval
        between = "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        ends = f"{path.points[0].loss:.3f}, {path.points[-1].loss:.3f}"
        table.add_row(folded(name), f"{path.barrier:.3f}", between, ends)
    return table


def _attention(report: ProbeReport) -> Table | None:
    if not report.attention:
        return None
    table = make_table()
    add_columns(table, "models")
    add_columns(table, "heads", "other heads", "equal", "permuted", numbers=True)
    for pair in report.attention:
        name, found = " and ".join(pair.pair), pair.cosine
        if found is None:
            table.add_row(folded(f"{name}: {pair.reason}"), "", "", "", "")
            continue
        values = found.mean, found.other_heads, found.uniform, found.permuted
        table.add_row(folded(name), *("–" if v is None else f"{v:.3f}" for v in values))
    return table


def _agreement(report: ProbeReport) -> Table | None:
    if not report.agreement:
        return None
    table = make_table()
    add_columns(table, "models")
    add_columns(table, "what")
    add_columns(table, "agree", "95 % interval", numbers=True)
    for pair in report.agreement:
        for what, share in (
            ("first token of the answer", pair.first_token),
            ("next token, all positions", pair.next_token),
            ("masked token", pair.masked_token),
            ("label", pair.label),
        ):
            if share is not None:
                low, high = share.interval
                between = f"{low:.1%} to {high:.1%}"
                name = folded(" and ".join(pair.pair))
                table.add_row(name, what, f"{share.share:.1%}", between)
    return table
