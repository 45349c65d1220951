"""Training by a command of the user's own: run without a shell, its output kept."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

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
        shutil.rmtree(scratch, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        status = _run(words, log, home)
    except FileNotFoundError as exc:
        problem = f"cannot be run: there is no {words[0]}"
        raise TrainingError(command, problem, "check the command in the recipe") from exc
    except OSError as exc:
        raise write_error(out, log.name, exc) from exc
    if status:
        last = list(_tail(log))
        for line in last:
            tell(f"  {line}")
        said = f"; it said last: {last[-1]}" if last else ""
        problem = f"exited with status {status}{said}"[:300]
        raise TrainingError(words[0], problem, f"its whole output is in {log}")
    _check(model, scratch, words[0], log)
    try:
        scratch.rename(out)
    except OSError as exc:
        raise write_error(out, "", exc) from exc


def _fill(word: str, filled: Mapping[str, str]) -> str:
    """Replace placeholders; other braces, of JSON for example, are left alone."""
    for placeholder, value in filled.items():
        word = word.replace(placeholder, value)
    return word


def _run(words: list[str], log: Path, home: Path) -> int:
    with (
        log.open("ab") as file,
        _ended(
            subprocess.Popen(
                words, cwd=home, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        ) as process,
    ):
        return process.wait()


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """No command outlives the run that began it: it is asked to end, then made to."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tail(log: Path) -> Iterator[str]:
    with log.open(encoding="utf-8", errors="replace") as file:
        lines = deque((line.rstrip() for line in file if line.strip()), maxlen=_TAIL)
    yield from lines


def _check(model: Path, made: Path, command: str, log: Path) -> None:
    """Refuse what is no checkpoint with the tensors of the model that training began with."""
    remedy = f"let it save the model it was given with save_pretrained; its output is in {log}"
    if not made.is_dir():
        raise TrainingError(command, "ended well, and left nothing at {output}", remedy)
    try:
        found = open_checkpoint(made, "trained").tensors
    except CheckpointError as exc:
        problem = f"left no checkpoint at {{output}} ({exc.problem})"
        raise TrainingError(command, problem, remedy) from exc
    expected = open_checkpoint(model, "starting").tensors
    for name in sorted({*expected, *found}):
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [str(spec.shape) if spec else "nothing" for spec in (ours, theirs)]
            problem = f"{name} is {shapes[0]} in {model} and {shapes[1]} in what it left"
            raise TrainingError(command, problem, remedy)
