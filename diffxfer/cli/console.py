"""Output for people and programs: results on stdout, messages on stderr.

Names come from untrusted files, so all text is made printable first.
"""

from __future__ import annotations

import errno
import json as json_module
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.adapter_table import print_kept
from diffxfer.cli.display import Display, hush_stdout
from diffxfer.cli.findings import error_as_json
from diffxfer.cli.hub import downloads
from diffxfer.cli.table import add_columns, folded, make_table, stdout
from diffxfer.errors import DiffxferError, listed, printable
from diffxfer.kernels import notices

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from typing_extensions import Self

    from diffxfer.diffs.jobs.report import Report
    from diffxfer.errors import MatchError

_INTERRUPTED, _STOPPED = 130, 143
_NOTHING = "nothing was written"
_PAIRING = {"ids": "by id", "tokens": "by token string"}
LOG = "diffxfer.log"
"""The log of what libraries print, in a command's output folder."""


class _Stopped(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class Console:
    """The console of a command; use it as a context manager.

    With `logs`, a command prints only through the methods of this class until the result is shown.

    Args:
        json: print one JSON object on stdout, even for an error.
        quiet: print only warnings and errors.
        output: the output folder, to report what is kept of it after an interruption.
        logs: whether to write what libraries print to a log instead of the terminal.
        interrupted: the message after an interruption, if nothing is kept in `output`.
        stage: the name of the first stage, if it has one.
    """

    _keeps_log = True
    """Whether the log is kept after success."""

    def __init__(
        self,
        *,
        json: bool,
        quiet: bool,
        output: Path | None = None,
        logs: bool = False,
        interrupted: str = _NOTHING,
        stage: str = "",
    ) -> None:
        # If a training has several processes, only the first one prints.
        self._others = os.environ.get("RANK", "0") != "0"
        self._json = json and not self._others
        self._quiet = quiet or self._others
        self._output = output
        self._display = Display(quiet=self._quiet)
        self._logs = logs
        self._interrupted = interrupted
        self._first_stage = stage
        self._stopped = False

    def _stop(self, _signum: int, _frame: FrameType | None) -> None:
        self._stopped = True
        raise _Stopped

    def __enter__(self) -> Self:
        self._sigterm = signal.signal(signal.SIGTERM, self._stop)
        if self._display.watched:
            notices.listen(lambda notice: print(notice, file=sys.stderr))
        if self._logs:
            self._display.open_log()
        if self._first_stage:
            self._display.stage(self._first_stage)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        log = self._end(exc)
        if isinstance(exc, KeyboardInterrupt):
            if self._stopped:
                exc = _Stopped()  # Ray raises another KeyboardInterrupt in its place
            # Handle it here, since typer turns an interrupt into a silent exit.
            sys.exit(print_interrupted(exc, self._left()))
        known = as_known(exc)
        if self._json and known is not None:
            print_json({"error": error_as_json(known, log)})
        if self._logs:
            hush_stdout()

    def _end(self, exc: BaseException | None) -> Path | None:
        """Erase the bar and let libraries print again; returns the log of a failure, if any."""
        signal.signal(signal.SIGTERM, self._sigterm)
        notices.listen(None)
        return self._display.close_log(exc, keep=self._keeps_log)

    def _left(self) -> str:
        """What is kept after an interruption, and how to resume."""
        from diffxfer.checkpoints.partial import find_unfinished

        kept = find_unfinished(self._output) if self._output else None
        again = "run the same command again to continue"
        return f"{again}; {kept}" if kept else self._interrupted

    @property
    def progress(self) -> Callable[[int, int], None] | None:
        """A callback for the bytes done and the total bytes; None without a terminal."""
        return self._display.bytes if self._display.watched else None

    @property
    def training(self) -> Callable[[int, int, float], None] | None:
        """A callback for the steps done, the total steps and the last loss; None if quiet."""
        return None if self._quiet else self._step

    def _step(self, done: int, total: int, loss: float) -> None:
        if self._interrupted == _NOTHING:
            self._interrupted = "the same command continues from the last saved state"
        self._display.steps(done, total, loss)

    @property
    def answered(self) -> Callable[[str, int, int], None] | None:
        """A callback for a model, its answered requests and their total; None if quiet."""
        return None if self._quiet else self._display.requests

    @contextmanager
    def logged(self, stage: str) -> Iterator[None]:
        """Keep what libraries print inside the block off the terminal.

        Args:
            stage: the name of the current stage.
        """
        self._display.open_log()
        self._display.stage(stage)
        try:
            yield
        except BaseException as exc:
            self._display.close_log(exc, keep=False)
            raise
        self._display.close_log(None, keep=False)

    @property
    def stage(self) -> Callable[[str], None]:
        """A callback for the name of each stage when it begins."""
        return self._display.stage

    def opened(self, folder: Path) -> None:
        """Move the log of what libraries print to a folder, now that it is writable."""
        self._display.settle_log(folder / LOG)

    def say(self, line: str) -> None:
        """Print a message on stderr."""
        self._display.say(line)

    def show(self, report: Report) -> None:
        """Print what was done, or for a dry run what would be done.

        Raises:
            typer.Exit: with status 1, if a dry run found tensors that cannot be matched.
        """
        self._display.stop()
        refusal = _refusal(report)
        if self._json:
            error = {"error": error_as_json(refusal)} if refusal else {}
            print_json({**report.as_json(), **error})
        else:
            if not report.written and not self._quiet:
                _print_plan(report)
            elif not self._quiet:
                _print_summary(report)
                print_kept(report)
            print_warnings(report.warnings)
        if refusal:
            print_error(refusal)
            raise typer.Exit(1)


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Print warnings on stderr, one line each."""
    for warning in warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)


def as_known(exc: BaseException | None) -> DiffxferError | None:
    """The exception as a failure with a known cause, or None.

    Errors of the operating system count as known, such as a folder without read permission.
    """
    if isinstance(exc, DiffxferError):
        return exc
    if isinstance(exc, OSError) and exc.errno != errno.EPIPE:
        where = exc.filename if isinstance(exc.filename, str) else ""
        return DiffxferError(where, exc.strerror or str(exc), "check that you may use it")
    return None


def print_error(exc: DiffxferError) -> None:
    """Print an error as one line on stderr."""
    typer.echo(f"error: {exc}", err=True)


def print_interrupted(exc: KeyboardInterrupt, remark: str = _NOTHING) -> int:
    """Print on stderr that a run was interrupted, and return its exit status.

    Args:
        exc: the interruption.
        remark: what is kept, and how to resume.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the process is already ending
    stopped = isinstance(exc, _Stopped)
    typer.echo(f"{'stopped' if stopped else 'interrupted'}: {printable(remark)}", err=True)
    return _STOPPED if stopped else _INTERRUPTED


def print_json(value: dict[str, Any]) -> None:
    """Print the JSON object of `--json`."""
    typer.echo(json_module.dumps(value))


def _refusal(report: Report) -> MatchError | None:
    from diffxfer.diffs.matching.refusal import refusal

    return refusal(report.refused) if report.refused else None


def _print_plan(report: Report) -> None:
    """The plan of a dry run, as a table on stdout."""
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
        lines.append(
            f"would read {gigabytes(report.bytes_to_read)} and write "
            f"{gigabytes(report.bytes_to_write)} at {report.output}, where "
            f"{gigabytes(report.free_bytes)} are free"
        )
    for line in lines:
        typer.echo(printable(line))


def _print_summary(report: Report) -> None:
    """Print a few lines on stderr, even without a terminal: they may be read later in a log."""
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
    if report.inexact:
        total = sum(report.inexact.values())
        every = report.parameters.get("extracted", total)
        lines.append(
            f"inexact: base + diff vector does not give back {total:,} of finetuned's {every:,}"
            " elements bit for bit; a wider --diff-dtype, such as float32, gives back more"
        )
    lines += _errors_of_codes(report)
    if report.left_out:
        lines.append(f"files left out: {listed(report.left_out)}")
    return lines
