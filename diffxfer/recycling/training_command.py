"""Training by a command that the user supplies; it runs without a shell, and its output is kept."""

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
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.writer import write_error
from diffxfer.diffs.matching.ties import find_head, without_tied_head
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor

_TAIL = 12
_PATIENCE_S = 20.0
_ALIVE_S = 1.0


def train_by_command(
    command: str,
    model: Path,
    out: Path,
    *,
    number: int,
    teacher: Path | None,
    home: Path,
    tell: Callable[[str], None],
    alive: Callable[[], None] | None = None,
) -> None:
    """Run a command that trains a model, and validate and publish the model that it writes.

    Args:
        command: the command line, with placeholders.
        model: the folder of the model to train.
        out: the folder to publish; the command writes to a temporary one, which is then renamed.
        number: the number of the round, for ``{round}``.
        teacher: the folder of the teacher, for ``{teacher}``.
        home: the working directory of the command.
        tell: called with the last lines of the output if the command fails.
        alive: called every second while it runs; an exception ends the command.

    Raises:
        TrainingError: if the command fails, or does not write a model with the same tensors.
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
            status = _run(words, file, home, alive)
    except OSError as exc:
        raise write_error(out, log.name, exc) from exc
    if status:
        last = list(_tail(log, begun))
        for line in last:
            tell(f"  {line}")
        problem = _describe_failure(status, last)
        raise TrainingError(words[0], problem, f"see its output in {log}")
    _check(model, scratch, words[0], log)
    try:
        _drop_copied_manifest(model, scratch)
        sync_tree(scratch)
        scratch.rename(out)
        sync_folder(out.parent)
    except OSError as exc:
        raise write_error(out, "", exc) from exc


def _describe_failure(status: int, output: Sequence[str]) -> str:
    """The exit status, or the signal that ended the command, and its last line of output."""
    ended = f"exited with status {status}"
    if status < 0:
        names = (known.name for known in signal.Signals if known == -status)
        ended = f"was terminated by {next(names, f'signal {-status}')}"
    last = f"; its last output line is: {output[-1]}" if output else ""
    return f"{ended}{last}"[:300]


def _fill(word: str, filled: Mapping[str, str]) -> str:
    """Replace the placeholders; other braces, such as those of JSON, are kept."""
    for placeholder, value in filled.items():
        word = word.replace(placeholder, value)
    return word


def _lock(log: BinaryIO, program: str) -> None:
    """Refuse to start while a command of an earlier, killed run is still running.

    That command inherited the open log file, and so holds its lock as long as it runs.
    """
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        problem = "is still running for a run that was killed"
        raise TrainingError(
            program, problem, f"terminate it, or wait for it; it writes to {log.name}"
        ) from exc


def _run(words: list[str], log: BinaryIO, home: Path, alive: Callable[[], None] | None) -> int:
    try:
        process = subprocess.Popen(
            words,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # In its own process group, so that Ctrl-C also ends the processes that it started.
            start_new_session=True,
        )
    except OSError as exc:
        problem = f"cannot be run in {home} ({exc.strerror})"
        raise TrainingError(words[0], problem, "check the command in the recipe") from exc
    with _ended(process):
        while alive is not None:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_ALIVE_S)
            alive()
        return process.wait()


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Terminate the command, and kill it if necessary, when the block is interrupted."""
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
    """The last lines of the output that begins at this byte of the log."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(begun)
        lines = deque((line.rstrip() for line in file if line.strip()), maxlen=_TAIL)
    yield from lines


def _check(model: Path, made: Path, command: str, log: Path) -> None:
    """Check that the command wrote a checkpoint with the tensors of the model that it trained."""
    remedy = f"save the trained model with save_pretrained; see its output in {log}"
    if not made.is_dir():
        raise TrainingError(command, "succeeded, but wrote no folder {output}", remedy)
    try:
        found = _own_tensors(open_checkpoint(made, "trained"))
    except CheckpointError as exc:
        problem = f"wrote no valid checkpoint to {{output}} ({exc.problem})"
        raise TrainingError(command, problem, remedy) from exc
    expected = _own_tensors(open_checkpoint(model, "starting"))
    for name in sorted({*expected, *found}):
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [str(spec.shape) if spec else "nothing" for spec in (ours, theirs)]
            problem = f"{name} is {shapes[0]} in {model} and {shapes[1]} in its output"
            raise TrainingError(command, problem, remedy)
    if read_tokenizer(model) is not None and read_tokenizer(made) is None:
        raise TrainingError(
            command, "wrote no tokenizer to {output}", f"save the tokenizer, too; {remedy}"
        )


def _drop_copied_manifest(model: Path, made: Path) -> None:
    """Remove the manifest if the command copied it from the model that it trained.

    A copied manifest describes the graft, not the trained model. A new manifest, such as that of a
    command that calls diffxfer tune, is kept.
    """
    theirs, copied = (folder / MANIFEST_NAME for folder in (model, made))
    if theirs.is_file() and copied.is_file() and theirs.read_bytes() == copied.read_bytes():
        copied.unlink()


def _own_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """All tensors but a tied head, which transformers does not save."""
    return without_tied_head(checkpoint.tensors, find_head(checkpoint.tensors, checkpoint.config))
