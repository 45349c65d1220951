"""The display of a running command: messages, a progress bar, and a log of libraries' output.

stdout is for results. While libraries run, everything that they print on either stream, including
from C code and child processes, goes to the log; messages and bar go to the original stderr.
"""

from __future__ import annotations

import faulthandler
import os
import shlex
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, TextIO, TypeGuard

import typer

from diffxfer.errors import DiffxferError, EvaluationError, TrainingError, printable

if TYPE_CHECKING:
    from diffxfer.cli.bar import Bar

_STDOUT, _STDERR = 1, 2
_LINES = 20
"""The number of training steps that a log shows."""
_PAUSE_S = 30.0
"""Seconds between lines about requests, without a terminal."""


class Display:
    """The messages and the bar of one command.

    Args:
        quiet: show neither.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Bar | None = None
        self._log: Log | None = None
        self._stage = ""
        self._what = ""
        self._last_line_s = time.monotonic()

    @property
    def watched(self) -> bool:
        """Whether there is a bar."""
        # With DIFFXFER_DEBUG=1 libraries print to the terminal, which would break the bar.
        mixed = self._log is not None and is_debugging()
        return not self._quiet and not mixed and self._stream.isatty()

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._log is None else self._log.talk

    def say(self, line: str) -> None:
        """Print a message."""
        if self._bar is not None:
            self._bar.say(printable(line))
        elif not self._quiet:
            typer.echo(printable(line), file=self._stream)

    def stage(self, stage: str) -> None:
        """Name the stage that begins; it precedes the names of its activities."""
        self._stage, self._what = stage, ""
        self.begin("")

    def begin(self, what: str) -> None:
        """Name an activity that begins, before its progress is known."""
        self._what = what
        self._last_line_s = time.monotonic()
        if self.watched:
            self._drawn().begin(self._text())

    def bytes(self, done: int, total: int) -> None:
        """Show the bytes done and the total bytes."""
        if self.watched:
            self._drawn().show(self._text(), done, total, "bytes")

    def steps(self, done: int, total: int, loss: float) -> None:
        """Show the training steps done, and the loss of the last one."""
        if self.watched:
            self._drawn().show(self._text(), done, total, "steps", f"loss {loss:.4f}")
        # A log should show that training proceeds, not every step.
        elif done in (1, total) or done % max(1, total // _LINES) == 0:
            self.say(f"step {done:,} of {total:,}: loss {loss:.4f}")

    def requests(self, what: str, done: int, total: int) -> None:
        """Show how many of a model's requests are answered; a total of 0 is not known yet."""
        if not total:
            self.begin(what)
            return
        self._what = what
        if self.watched:
            self._drawn().show(self._text(), done, total, "requests")
        elif done and time.monotonic() - self._last_line_s > _PAUSE_S:
            self._last_line_s = time.monotonic()
            self.say(f"{self._text()}: {done:,} of {total:,} requests")

    def _text(self) -> str:
        return ": ".join(filter(None, (self._stage, self._what)))

    def _drawn(self) -> Bar:
        if self._bar is None:
            from diffxfer.cli.bar import Bar

            self._bar = Bar(self._stream)
        return self._bar

    def stop(self) -> None:
        """Erase the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def open_log(self) -> None:
        """Start the log: libraries no longer print to the terminal."""
        self._log = Log()

    def settle_log(self, path: Path) -> None:
        """Move the log to a file.

        Args:
            path: a file in a writable folder.
        """
        if self._log is not None:
            self._log.settle(path)

    def close_log(self, exc: BaseException | None, *, keep: bool) -> Path | None:
        """Restore the streams and close the log; an empty log is removed.

        Args:
            exc: the exception that ended the work, if any; the log's path is added to it.
            keep: whether a log in a user's folder is kept after success.

        Returns:
            The log of a failure, if there is anything in it.
        """
        self.stop()
        log, self._log = self._log, None
        if log is None:
            return None
        failure = exc if _is_of_libraries(exc) else None
        path = log.close(failure, keep=keep)
        if failure is None or path is None:
            return None
        said = f"the output of its libraries is in {path}"
        if isinstance(exc, DiffxferError):
            exc.remedy = f"{exc.remedy}; {said}" if exc.remedy else said
        else:
            typer.echo(printable(said), err=True)
        return path


class Log:
    """A file that receives everything printed on stdout and stderr, until it is closed.

    It begins as a temporary file, since its folder may not exist yet.

    Attributes:
        talk: the original stderr.
    """

    def __init__(self) -> None:
        _flush()
        self._fd, self._path = _begin()
        self._head = os.fstat(self._fd).st_size
        self._before = 0
        self._settled = False
        self._restored = ExitStack()
        self._saved = {fd: os.dup(fd) for fd in (_STDOUT, _STDERR)}
        if _is_on(sys.stderr, _STDERR):
            encoding = sys.stderr.encoding
            self.talk: TextIO = open(  # noqa: SIM115, PTH123 closed in `close`; a descriptor
                os.dup(_STDERR), "w", 1, encoding, "backslashreplace"
            )
            self._restored.callback(self.talk.close)
        else:
            self.talk = sys.stderr
            # A stream on the descriptor itself, since loggers may keep the stream for longer.
            self._restored.enter_context(redirect_stderr(_stream_on(_STDERR)))
        if not _is_on(sys.stdout, _STDOUT):
            self._restored.enter_context(redirect_stdout(_stream_on(_STDOUT)))
        for fd in self._saved:
            os.dup2(self._fd, fd)
        _let_libraries_talk()
        if not faulthandler.is_enabled() and _has_descriptor(self.talk):
            # Otherwise the trace of a crash in C would go only to the log.
            faulthandler.enable(self.talk)
            self._restored.callback(faulthandler.disable)

    def settle(self, path: Path) -> None:
        """Continue the log in a permanent file; if that fails, in the temporary one.

        Args:
            path: the file; it keeps what an earlier run wrote.
        """
        if self._path is None:
            return
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
            if not S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                return
            before = os.fstat(fd).st_size
            try:
                _flush()
                os.write(fd, self._path.read_bytes())
            except OSError:
                os.close(fd)
                if not before:
                    path.unlink()
                return
            for number in (self._fd, _STDOUT, _STDERR):
                os.dup2(fd, number, inheritable=number != self._fd)
            os.close(fd)
            self._path.unlink()
            self._path, self._settled = path, True
            self._head, self._before = self._head + before, before

    def close(self, exc: Exception | None, *, keep: bool) -> Path | None:
        """Restore stdout and stderr.

        Args:
            exc: the failure, if any; its traceback is written to the log.
            keep: whether a permanent file is kept after success.

        Returns:
            The file, if it is kept.
        """
        # A full disk must neither hide the failure nor prevent restoring the streams.
        with suppress(OSError):
            _end_bars()
            _flush()
        if exc is not None and (exc.__cause__ or not isinstance(exc, DiffxferError | OSError)):
            lines = "".join(traceback.format_exception(exc))
            with suppress(OSError):
                os.write(self._fd, lines.encode("utf-8", "backslashreplace"))
        said = os.fstat(self._fd).st_size > self._head
        for fd, before in self._saved.items():
            os.dup2(before, fd)
            os.close(before)
        os.close(self._fd)
        self._restored.close()
        if self._path is None:
            return None
        if said and (exc is not None or (keep and self._settled)):
            return self._path
        with suppress(OSError):
            if self._before and (exc is not None or keep):
                os.truncate(self._path, self._before)
            else:
                self._path.unlink()
        return None


def hush_stdout() -> None:
    """Silence the process's stdout: libraries may still print when they are unloaded."""
    stdout = sys.__stdout__
    if stdout is not None and sys.stdout is stdout:
        stdout.flush()
        os.dup2(_STDERR, _STDOUT)


def is_debugging() -> bool:
    """Whether libraries should print to the terminal."""
    return os.environ.get("DIFFXFER_DEBUG") == "1"


def _begin() -> tuple[int, Path | None]:
    """The descriptor that libraries print to, and its file, if there is one."""
    if is_debugging():
        return os.dup(_STDERR), None
    try:
        fd, name = tempfile.mkstemp(prefix="diffxfer-", suffix=".log")
    except OSError:  # work without a log if there is no space for temporary files
        return os.open(os.devnull, os.O_WRONLY), None
    command = f"$ diffxfer {shlex.join(sys.argv[1:])}\n"
    with suppress(OSError):
        os.write(fd, command.encode("utf-8", "backslashreplace"))
    return fd, Path(name)


def _let_libraries_talk() -> None:
    """Raise the verbosity of libraries: the log may help, and nobody has to read it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_debugging():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds: each update is a line in the log


def _is_of_libraries(exc: BaseException | None) -> TypeGuard[Exception]:
    """Whether the libraries' output may explain a failure better than its own line.

    It does not for an invalid option, an unusable folder or tensors that cannot be matched.
    """
    if isinstance(exc, EvaluationError):
        return exc.__cause__ is not None
    known = isinstance(exc, DiffxferError | typer.Exit)
    return isinstance(exc, TrainingError) or (isinstance(exc, Exception) and not known)


def _end_bars() -> None:
    """Close the bars that a failure left open: otherwise each prints to the terminal at the end."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        bar.close()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _is_on(stream: TextIO, fd: int) -> bool:
    return _has_descriptor(stream) and stream.fileno() == fd


def _has_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def _stream_on(fd: int) -> TextIO:
    """A stream that does not close the descriptor."""
    return open(fd, "w", 1, "utf-8", "backslashreplace", closefd=False)
