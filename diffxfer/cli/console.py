"""What a person or a program sees: stdout for results, stderr for talk.

Names come from files that anyone may have written, so all text is made printable first.
"""

from __future__ import annotations

import errno
import json as json_module
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from diffxfer.cli.findings import error_as_json
from diffxfer.cli.hub import downloads, gigabytes
from diffxfer.diffs.report import listed
from diffxfer.errors import DiffxferError, printable

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from rich.progress import Progress

    from diffxfer.diffs.report import Report
    from diffxfer.errors import MatchError
    from diffxfer.recycling.report import TuneReport

_INTERRUPTED, _STOPPED = 130, 143
_NOTHING = "nothing was written"
_PAIRING = {"ids": "by id", "tokens": "by token string"}
PIPE_WIDTH = 10_000
"""How wide lines may be where no terminal is: they are not folded."""
_LINES = 20
"""How many steps of a training a log shows."""


class _Stopped(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise _Stopped


class Console:
    """One command's way to talk; use it as a context manager.

    Args:
        json: print one JSON object on stdout, also for an error.
        quiet: print nothing but warnings and errors.
        output: the folder that is made, to say what is kept of it after an interruption.
        interrupted: what it means for the command to be interrupted, where nothing is kept there.
    """

    def __init__(
        self,
        *,
        json: bool,
        quiet: bool,
        output: Path | None = None,
        interrupted: str = _NOTHING,
    ) -> None:
        # Of several processes of one training, the first one talks.
        self._others = os.environ.get("RANK", "0") != "0"
        self._json = json and not self._others
        self._quiet = quiet or self._others
        self._output = output
        self._bar: Progress | None = None
        self._interrupted = interrupted

    def __enter__(self) -> Console:
        self._sigterm = signal.signal(signal.SIGTERM, _stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._sigterm)
        self._stop_bar()
        if isinstance(exc, KeyboardInterrupt):
            # Here, since typer turns an interrupt into an exit without a word.
            sys.exit(print_interrupted(exc, self._left()))
        known = as_known(exc)
        if self._json and known is not None:
            print_json({"error": error_as_json(known)})

    def _left(self) -> str:
        """What an interruption leaves, and how to go on."""
        from diffxfer.checkpoints.partial import find_unfinished

        kept = find_unfinished(self._output) if self._output else None
        again = "run the same command again to continue"
        return f"{again}; {kept}" if kept else self._interrupted

    @property
    def progress(self) -> Callable[[int, int], None] | None:
        """What to call with the bytes done and in all; None where nobody watches."""
        return None if self._quiet or not sys.stderr.isatty() else self._advance

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None:
            from diffxfer.cli.bars import make_bar

            self._bar = make_bar()
            self._bar.start()
            self._bar.add_task("", total=total, completed=done)
        task = self._bar.tasks[0]
        if total != task.total:  # downloads are over, and the work begins
            self._bar.reset(task.id, total=total)
        self._bar.update(task.id, completed=done)

    @property
    def training(self) -> Callable[[int, int, float], None] | None:
        """What to call with the steps done, the steps in all and the last loss; None if quiet."""
        return None if self._quiet else self._step

    def _step(self, done: int, total: int, loss: float) -> None:
        if self._interrupted == _NOTHING:
            self._interrupted = "the same command goes on from the last state that was saved"
        if not sys.stderr.isatty():
            # A log is to show that it goes on, not every step.
            if done in (1, total) or done % max(1, total // _LINES) == 0:
                typer.echo(f"step {done:,} of {total:,}: loss {loss:.4f}", err=True)
            return
        if self._bar is None:
            from diffxfer.cli.bars import make_step_bar

            self._bar = make_step_bar()
            self._bar.start()
            self._bar.add_task("", total=total, loss="")
        self._bar.update(self._bar.task_ids[0], completed=done, loss=f"loss {loss:.4f}")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """Print a line of talk on stderr."""
        self._stop_bar()
        if not self._quiet:
            typer.echo(printable(line), err=True)

    def show(self, report: Report) -> None:
        """Print what was done, or with a dry run what would be.

        Raises:
            typer.Exit: with status 1, if a dry run found tensors that fit nowhere.
        """
        self._stop_bar()
        refusal = _refusal(report)
        if self._json:
            error = {"error": error_as_json(refusal)} if refusal else {}
            print_json({**report.as_json(), **error})
        else:
            if not report.written and not self._quiet:
                _print_plan(report)
            elif not self._quiet:
                _print_summary(report)
            print_warnings(report.warnings)
        if refusal:
            print_error(refusal)
            raise typer.Exit(1)

    def show_tuned(self, report: TuneReport) -> None:
        """Print what was trained."""
        self._stop_bar()
        if self._json:
            print_json(report.as_json())
            return
        if not self._quiet:
            for line in _tuning(report):
                typer.echo(printable(line), err=True)
        if not self._others:
            print_warnings(report.warnings)


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Print warnings on stderr, one line each."""
    for warning in warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)


def as_known(exc: BaseException | None) -> DiffxferError | None:
    """The failure with a known cause that an exception is, if it is one.

    What the operating system refuses is one wherever it happens, a folder that may not be read
    for example.
    """
    if isinstance(exc, DiffxferError):
        return exc
    if isinstance(exc, OSError) and exc.errno != errno.EPIPE:
        where = exc.filename if isinstance(exc.filename, str) else ""
        return DiffxferError(where, exc.strerror or str(exc), "check that it can be used")
    return None


def print_error(exc: DiffxferError) -> None:
    """Print an error as one line on stderr."""
    typer.echo(f"error: {exc}", err=True)


def print_interrupted(exc: KeyboardInterrupt, remark: str = _NOTHING) -> int:
    """Say on stderr that a run was interrupted and what that means, and give its exit status.

    Args:
        exc: by what.
        remark: what is kept, and how to go on.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # it is ending already
    stopped = isinstance(exc, _Stopped)
    typer.echo(f"{'stopped' if stopped else 'interrupted'}: {printable(remark)}", err=True)
    return _STOPPED if stopped else _INTERRUPTED


def print_json(value: dict[str, Any]) -> None:
    """Print the one object that `--json` asks for."""
    typer.echo(json_module.dumps(value))


def _refusal(report: Report) -> MatchError | None:
    from diffxfer.diffs.matching.refusal import refusal

    return refusal(report.refused) if report.refused else None


def _print_plan(report: Report) -> None:
    """The plan of a dry run, as a table on stdout."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for heading in ("fate", "tensors"):
        table.add_column(heading)
    table.add_column("count", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("why")
    for group in report.plan:
        cells = (
            group.kind,
            group.pattern,
            f"{group.tensors:,}",
            f"{group.parameters:,}",
            group.why,
        )
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    for culprits in report.refused:
        why = f"{culprits.reason}: {culprits.found}, expected {culprits.expected}"
        cells = ("refused", culprits.pattern, f"{len(culprits.names):,}", "", why)
        table.add_row(*(Text(printable(cell), overflow="fold", style="red") for cell in cells))
    # Lines that no person reads are not cut to the width of a terminal.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    RichConsole(highlight=False, width=width).print(table)
    typer.echo("")
    lines = _remarks(report)
    if not report.refused:
        lines += downloads(report.bytes_to_fetch, done=False)
        lines.append(
            f"would read {gigabytes(report.bytes_to_read)} and write "
            f"{gigabytes(report.bytes_to_write)} at {report.output}, where "
            f"{gigabytes(report.free_bytes)} are free"
        )
    for line in lines:
        typer.echo(printable(line))


def _print_summary(report: Report) -> None:
    """A few lines on stderr, also where nobody watches: a log is read later."""
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
    return [f"continued: {resumed * 100 // total} % was done already"] if resumed else []


def _tuning(report: TuneReport) -> list[str]:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.tensors.items())
    begun = f", continued from step {report.continued_from:,}" if report.continued_from else ""
    first, last = report.log[0]["loss"], report.log[-1]["loss"]
    return [
        f"steps: {report.steps:,} on {report.rows:,} rows{begun}; loss {first:.4f} → {last:.4f}",
        f"tensors: {counts}",
        f"wrote {report.output}: {gigabytes(report.bytes_to_write)} in {report.elapsed_s:.1f} s",
    ]


def _remarks(report: Report) -> list[str]:
    """What a person should know beside the counts, one line each."""
    lines = [
        f"{' and '.join(relation.roles)}: cosine {relation.cosine:.2f}"
        f" ({relation.samples:,} sampled weights)"
        for relation in report.relations
    ]
    lines += report.notes
    if report.device_why or report.device != "cpu":
        why = f", as {report.device_why}" if report.device_why else ""
        lines.append(f"device: {report.device}{why}")
    if report.vocabulary in _PAIRING:
        lines.append(f"rows of the vocabulary: paired {_PAIRING[report.vocabulary]}")
    if report.added_tokens:
        lines.append(f"tokens added to the target: {listed(report.added_tokens)}")
    if report.inexact:
        total = sum(report.inexact.values())
        every = report.parameters.get("extracted", total)
        lines.append(
            f"inexact: base + diff vector does not give back {total:,} of finetuned's {every:,}"
            " elements bit for bit; a wider --diff-dtype, such as float32, gives back more"
        )
    if report.left_out:
        lines.append(f"files left out: {listed(report.left_out)}")
    return lines
