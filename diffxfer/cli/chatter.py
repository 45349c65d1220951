"""Keeping stdout for results while libraries print what they like."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_STDOUT, _STDERR = 1, 2


@contextmanager
def chatter_on_stderr(*, quiet: bool) -> Iterator[None]:
    """Send to stderr what is printed on stdout inside the block, by C and by child processes too.

    Args:
        quiet: send it, and what is printed on stderr, to nowhere.
    """
    _quiet_loggers()
    sys.stdout.flush()
    sys.stderr.flush()
    moved = (_STDOUT, _STDERR) if quiet else (_STDOUT,)
    saved = {fd: os.dup(fd) for fd in moved}
    sink = os.open(os.devnull, os.O_WRONLY) if quiet else os.dup(_STDERR)
    for fd in moved:
        os.dup2(sink, fd)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        for fd, before in saved.items():
            os.dup2(before, fd)
            os.close(before)
        os.close(sink)


def hush_stdout() -> None:
    """Let nothing more come to the process's stdout: libraries print when they are unloaded too."""
    stdout = sys.__stdout__
    if stdout is not None and sys.stdout is stdout:
        stdout.flush()
        os.dup2(_STDERR, _STDOUT)


def _quiet_loggers() -> None:
    """Warnings about what this program asks of libraries are nothing that its user can change."""
    if os.environ.get("DIFFXFER_DEBUG") == "1":
        return
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
