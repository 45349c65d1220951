"""The console of `diffxfer push`."""

from __future__ import annotations

import sys

import typer

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.console import Console, print_json, print_warnings
from diffxfer.errors import printable
from diffxfer.publishing.push_report import PushReport

_KEPT = "nothing was published; the same command skips files already uploaded"


class PushConsole(Console):
    """The console of a push; use it as a context manager.

    Args:
        json: print one JSON object on stdout, even for an error.
        quiet: print only warnings and errors.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        super().__init__(json=json, quiet=quiet, interrupted=_KEPT)

    @property
    def watched(self) -> bool:
        """Whether to show a progress bar."""
        return not self._quiet and sys.stderr.isatty()

    def show_pushed(self, report: PushReport) -> None:
        """Print what was published, or for a dry run what would be published."""
        if self._json:
            print_json(report.as_json())
            return
        if not self._quiet:
            (_print_plan if report.dry_run else _print_summary)(report)
        print_warnings(report.warnings)


def _print_plan(report: PushReport) -> None:
    """Print files, bytes and the card on stdout."""
    width = max(len(printable(file.name)) for file in report.files)
    for file in report.files:
        size = "" if file.fate == "removed" else gigabytes(file.bytes)
        typer.echo(f"{printable(file.name):{width}}  {size:>10}  {file.fate}")
    made = "a new repository" if report.created else "there"
    typer.echo(
        f"\nwould upload {gigabytes(report.bytes_to_upload)} of {gigabytes(report.bytes_in_all)}"
        f" to {report.url} ({made}), with this card:\n"
    )
    for line in report.card.splitlines():
        typer.echo(printable(line))


def _print_summary(report: PushReport) -> None:
    lines = [_outcome(report)]
    if not report.pushed:
        lines.append("nothing to do: the Hub already has these files")
    lines += [report.url, report.use]
    for line in lines:
        typer.echo(printable(line), err=True)


def _outcome(report: PushReport) -> str:
    counts = {
        fate: sum(file.fate == fate for file in report.files)
        for fate in ("new", "changed", "unchanged", "removed")
    }
    told = ", ".join(f"{count:,} {fate}" for fate, count in counts.items() if count)
    sent = f"; {gigabytes(report.bytes_to_upload)} were new" if report.pushed else ""
    return f"files: {told}{sent}, in {report.elapsed_s:.1f} s"
