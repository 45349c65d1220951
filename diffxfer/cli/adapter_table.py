"""Tables of adapters on stdout: what they keep of Δ, and how far base + Δ is from a fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.table import add_columns, folded, make_table, stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.diffs.artifact.distances import Distance
    from diffxfer.diffs.jobs.report import Report


def print_kept(report: Report) -> None:
    """Print what an adapter keeps of Δ, layer by layer; nothing for another report.

    Args:
        report: the report of a command.
    """
    from diffxfer.diffs.lora.report import AdapterReport

    if not isinstance(report, AdapterReport) or not report.layers:
        return
    rows = [
        (layer.layer, layer.kept, layer.ranks, layer.bytes, layer.full_bytes)
        for layer in report.layers
    ]
    ranks = [rank for _, _, pair, _, _ in rows for rank in pair if rank] or [0]
    sizes = sum(row[3] for row in rows), sum(row[4] for row in rows)
    rows.append(("all", report.kept, (min(ranks), max(ranks)), *sizes))
    print_table(
        ("layer", "‖Δ‖² kept", "rank", "adapter", "whole Δ"),
        [
            (name, f"{kept:.2%}", _ranks(*pair, size), gigabytes(size), gigabytes(full))
            for name, kept, pair, size, full in rows
        ],
    )


def print_distances(distances: Sequence[Distance] | None) -> None:
    """Print how far base + Δ is from a fine-tune, layer by layer.

    Args:
        distances: those of tensors; nothing is printed if there are none.
    """
    if not distances:
        return
    from dataclasses import replace

    from diffxfer.diffs.artifact.distances import by_layer, percent, together

    rows = [*by_layer(distances), replace(together(distances), name="all")]
    print_table(
        ("layer", "‖error‖/‖Δ‖", "‖error‖", "‖Δ‖"),
        [
            (
                row.name,
                percent(row.ratio),
                f"{row.error_norm:.4g}",
                f"{row.delta_norm:.4g}",
            )
            for row in rows
        ],
    )


def _ranks(least: int, most: int, size: int) -> str:
    if not most:
        return "whole" if size else "left out"
    return f"{most}" if least == most else f"{least} to {most}"


def print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table whose columns but the first are numbers.

    Args:
        headings: the columns' names.
        rows: their cells.
    """
    table = make_table()
    add_columns(table, headings[0])
    add_columns(table, *headings[1:], numbers=True)
    for row in rows:
        table.add_row(*map(folded, row))
    stdout().print(table)
