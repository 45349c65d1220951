"""How `diffxfer tune` talks: steps and their loss, and what came of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from diffxfer.cli.console import Console, print_json, print_warnings
from diffxfer.cli.hub import gigabytes
from diffxfer.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.recycling.training_report import TuneReport


class TuneConsole(Console):
    """One training's way to talk; use it as a context manager.

    The output is a checkpoint and nothing else, and not there before it is whole: the log is beside
    it, and gone when all went well.

    Args:
        output: the checkpoint that is made.
        json: print one JSON object on stdout, also for an error.
        quiet: print nothing but warnings and errors.
    """

    _keeps_log = False

    def __init__(self, output: Path, *, json: bool, quiet: bool) -> None:
        super().__init__(json=json, quiet=quiet, logs=True)
        self._made = output

    def __enter__(self) -> TuneConsole:
        super().__enter__()
        self._display.stage("tuning")
        return self

    def opened(self, folder: Path) -> None:
        """Keep what libraries print beside the output, which has a place now."""
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
    return [
        f"steps: {report.steps:,} on {report.rows:,} rows{begun}; loss {first:.4f} → {last:.4f}",
        f"tensors: {counts}",
        f"wrote {report.output}: {gigabytes(report.bytes_to_write)} in {report.elapsed_s:.1f} s",
    ]
