"""The console of `diffxfer tune`: steps with their loss, and the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.console import Console, print_json, print_warnings
from diffxfer.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.recycling.training_report import TuneReport


class TuneConsole(Console):
    """The console of a training; use it as a context manager.

    The output folder is a checkpoint and appears only when it is complete. So the log is beside it,
    and is removed after success.

    Args:
        output: the checkpoint to create.
        json: print one JSON object on stdout, even for an error.
        quiet: print only warnings and errors.
    """

    _keeps_log = False

    def __init__(self, output: Path, *, json: bool, quiet: bool) -> None:
        super().__init__(json=json, quiet=quiet, logs=True, stage="tuning")
        self._made = output

    def opened(self, folder: Path) -> None:
        """Move the log beside the output, whose parent folder now exists."""
        self._display.settle_log(folder.parent / f"{self._made.name}.log")

    def show_tuned(self, report: TuneReport) -> None:
        """Print what was trained."""
        self._display.close_log(None, keep=self._keeps_log)
        if self._json:
            print_json(report.as_json())
            return
        if not self._quiet:
            for line in _lines(report):
                typer.echo(printable(line), err=True)
        if not self._others:
            print_warnings(report.warnings)


def _lines(report: TuneReport) -> list[str]:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.tensors.items())
    begun = f", continued from step {report.continued_from:,}" if report.continued_from else ""
    first, last = report.log[0]["loss"], report.log[-1]["loss"]
    causal = report.objective == "causal"
    return [
        *([] if causal else [f"objective: {report.objective}"]),
        f"steps: {report.steps:,} on {report.rows:,} rows{begun}; loss {first:.4f} → {last:.4f}",
        *report.notes,
        f"tensors: {counts}",
        f"wrote {report.output}: {gigabytes(report.bytes_to_write)} in {report.elapsed_s:.1f} s",
    ]
