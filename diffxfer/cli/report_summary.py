"""What `extract`, `apply` and `transfer` say at the end: the plan of a dry run, or what is done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import typer

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.exactness import exactness
from diffxfer.cli.hub import downloads
from diffxfer.cli.table import add_columns, folded, make_table, stdout
from diffxfer.errors import listed, printable

if TYPE_CHECKING:
    from diffxfer.diffs.jobs.report import Report

_PAIRING = {"ids": "by id", "tokens": "by token string"}


def print_plan(report: Report) -> None:
    """Print the plan of a dry run, as a table on stdout.

    Args:
        report: of the dry run.
    """
    table = make_table()
    add_columns(table, "fate", "tensors")
    add_columns(table, "count", "parameters", numbers=True)
    add_columns(table, "why")
    for group in report.plan:
        cells = (
            group.kind,
            group.pattern,
            f"{group.tensors:,}",
            f"{group.parameters:,}",
            group.why,
        )
        table.add_row(*map(folded, cells))
    for culprits in report.refused:
        why = f"{culprits.reason}: {culprits.found}, expected {culprits.expected}"
        cells = ("refused", culprits.pattern, f"{len(culprits.names):,}", "", why)
        table.add_row(*(folded(text, "red") for text in cells))
    stdout().print(table)
    typer.echo("")
    lines = _remarks(report)
    if not report.refused:
        lines += downloads(report.bytes_to_fetch, done=False)
        most = "" if report.packed_estimate is None else "at most "
        lines.append(
            f"would read {gigabytes(report.bytes_to_read)} and write "
            f"{most}{gigabytes(report.bytes_to_write)} at {report.output}, where "
            f"{gigabytes(report.free_bytes)} are free"
        )
    for line in lines:
        typer.echo(printable(line))


def print_summary(report: Report) -> None:
    """Print a few lines on stderr, even without a terminal: they may be read later in a log.

    Args:
        report: of what was done.
    """
    total = report.bytes_to_read + report.bytes_to_write
    moved = total - report.resumed_bytes
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.tensors.items())
    speed = gigabytes(int(moved / max(report.elapsed_s, 1e-3)))
    lines = [
        f"tensors: {counts}",
        *_continued(report.resumed_bytes, total),
        *_remarks(report),
        *downloads(report.bytes_to_fetch, done=True),
        f"wrote {report.output}: {gigabytes(report.bytes_to_write)} in {report.elapsed_s:.1f} s"
        f" (read and wrote {speed}/s)",
    ]
    for line in lines:
        typer.echo(printable(line), err=True)


def _continued(resumed: int, total: int) -> list[str]:
    return [f"continued: {resumed * 100 // total} % was already done"] if resumed else []


def _errors_of_codes(report: Report) -> list[str]:
    """How far tensors that were quantised anew are from the exact graft, in all and the worst."""
    errors = report.requantized
    if not errors:
        return []
    change, error = (math.hypot(*(getattr(e, f) for e in errors)) for f in ("change", "error"))
    worst = max(errors, key=lambda each: each.ratio)
    whole = f"{error / change:.1%} of ‖α·Δ‖" if change else f"{error:.3g}"
    return [
        f"quantised anew: {len(errors):,} tensors; ‖stored − exact graft‖ is {whole},"
        f" and {worst.ratio:.1%} in {worst.name}"
    ]


def _remarks(report: Report) -> list[str]:
    """Remarks besides the counts, one line each."""
    lines = [
        f"{' and '.join(relation.roles)}: cosine {relation.cosine:.2f}"
        f" ({relation.samples:,} sampled weights)"
        for relation in report.relations
    ]
    lines += report.notes
    if report.device_why or report.device != "cpu":
        why = f", since {report.device_why}" if report.device_why else ""
        lines.append(f"device: {report.device}{why}")
    if report.vocabulary in _PAIRING:
        lines.append(f"rows of the vocabulary: paired {_PAIRING[report.vocabulary]}")
    if report.added_tokens:
        where = "by finetuned" if report.command == "extract" else "to the target"
        lines.append(f"tokens added {where}: {listed(report.added_tokens)}")
    lines += exactness(report)
    lines += _errors_of_codes(report)
    if report.left_out:
        lines.append(f"files left out: {listed(report.left_out)}")
    return lines
