"""Training by a command of the user's own: run without a shell, its output kept."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

from diffxfer.checkpoints.filesystem import sync_folder, sync_tree
from diffxfer.checkpoints.place import MANIFEST_NAME
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.writer import write_error
from diffxfer.diffs.matching.ties import find_head, without_tied_head
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.checkpoints.reader import Checkpoint

_TAIL = 12
_PATIENCE_S = 20.0


def train_by_command(
    command: str,
    model: Path,
    out: Path,
    *,
    number: int,
    teacher: Path | None,
    home: Path,
    tell: Callable[[str], None],
) -> None:
    """Run a command that trains a model, and take over what it left.

    Args:
        command: with placeholders.
        model: the folder to begin with.
        out: the folder to make; the command writes to another, which is renamed when it is sound.
        number: the round.
        teacher: for ``{teacher}``.
        home: the folder to run it in.
        tell: called with the last lines of its output if it fails.

    Raises:
        TrainingError: if it fails, or leaves anything but a model with the same tensors.
    """
    scratch = out.with_name(f".{out.name}.command")
    log = out.with_name(f"{out.name}.log")
    filled = {
        "{model}": str(model),
        "{output}": str(scratch),
        "{round}": str(number),
        "{teacher}": str(teacher),
    }
    words = [_fill(word, filled) for word in shlex.split(command)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            _lock(file, words[0])
            if scratch.is_dir():
                shutil.rmtree(scratch)
            scratch.unlink(missing_ok=True)
            begun = file.seek(0, os.SEEK_END)
            status = _run(words, file, home)
    except OSError as exc:
        raise write_error(out, log.name, exc) from exc
    if status:
        last = list(_tail(log, begun))
        for line in last:
            tell(f"  {line}")
        said = f"; it said last: {last[-1]}" if last else ""
        ended = f"was ended by {_name(-status)}" if status < 0 else f"exited with status {status}"
        problem = f"{ended}{said}"[:300]
        raise TrainingError(words[0], problem, f"its whole output is in {log}")
    _check(model, scratch, words[0], log)
    try:
        _drop_copied_manifest(model, scratch)
        sync_tree(scratch)
        scratch.rename(out)
        sync_folder(out.parent)
    except OSError as exc:
        raise write_error(out, "", exc) from exc


def _name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def _fill(word: str, filled: Mapping[str, str]) -> str:
    """Replace placeholders; other braces, of JSON for example, are left alone."""
    for placeholder, value in filled.items():
        word = word.replace(placeholder, value)
    return word


def _lock(log: BinaryIO, program: str) -> None:
    """Refuse to begin beside a command that outlived a run that was killed.

    The command writes to this very log, and so holds its lock for as long as it runs.
    """
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        problem = "is still running, for a run that was killed"
        raise TrainingError(
            program, problem, f"end it, or wait for it; it writes {log.name}"
        ) from exc


def _run(words: list[str], log: BinaryIO, home: Path) -> int:
    try:
        process = subprocess.Popen(
            words,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # In a group of its own: Ctrl-C reaches it by way of us, with all that it started.
            start_new_session=True,
        )
    except OSError as exc:
        problem = f"cannot be run in {home} ({exc.strerror})"
        raise TrainingError(words[0], problem, "check the command in the recipe") from exc
    with _ended(process):
        return process.wait()


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """No command outlives a run that is interrupted: it is asked to end, then made to."""
    try:
        yield
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _signal(process, signal.SIGKILL)
                process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _tail(log: Path, begun: int) -> Iterator[str]:
    """The last lines of a run, whose output begins at that byte of the log."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(begun)
        lines = deque((line.rstrip() for line in file if line.strip()), maxlen=_TAIL)
    yield from lines


def _check(model: Path, made: Path, command: str, log: Path) -> None:
    """Refuse what is no checkpoint with the tensors of the model that training began with."""
    remedy = f"let it save the model it was given with save_pretrained; its output is in {log}"
    if not made.is_dir():
        raise TrainingError(command, "ended well, and left nothing at {output}", remedy)
    try:
        found = _own_tensors(open_checkpoint(made, "trained"))
    except CheckpointError as exc:
        problem = f"left no checkpoint at {{output}} ({exc.problem})"
        raise TrainingError(command, problem, remedy) from exc
    expected = _own_tensors(open_checkpoint(model, "starting"))
    for name in sorted({*expected, *found}):
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [str(spec.shape) if spec else "nothing" for spec in (ours, theirs)]
            problem = f"{name} is {shapes[0]} in {model} and {shapes[1]} in what it left"
            raise TrainingError(command, problem, remedy)
    if read_tokenizer(model) is not None and read_tokenizer(made) is None:
        raise TrainingError(command, "left no tokenizer at {output}", f"save it too; {remedy}")


def _drop_copied_manifest(model: Path, made: Path) -> None:
    """Remove the manifest of the model it began with, if the command copied that along.

    It would say of the trained model what is true of the graft. One of its own, as of a command
    that calls diffxfer tune, stays.
    """
    theirs, copied = (folder / MANIFEST_NAME for folder in (model, made))
    if theirs.is_file() and copied.is_file() and theirs.read_bytes() == copied.read_bytes():
        copied.unlink()


def _own_tensors(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """All but a tied head, which transformers leaves out when it saves."""
    return without_tied_head(checkpoint.tensors, find_head(checkpoint.tensors, checkpoint.config))
