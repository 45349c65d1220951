"""Errors for NaN, infinity and overflow, which name the tensor and the first such element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.values import elements, in_float64
from diffxfer.errors import NonFiniteError
from diffxfer.streaming.plan import Chunk, Operation, Piece, TensorTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ALLOW = "correct the checkpoint, or give --allow-nonfinite to accept it"
_INPUTS: Mapping[Operation, tuple[str, ...]] = {
    Operation.TRANSFER: ("finetuned", "base", "target"),
    Operation.APPLY: ("diff vector", "target"),
    Operation.GIVE_BACK: ("diff vector", "target"),
    Operation.SUBTRACT: ("finetuned", "base"),
    Operation.EXACT: ("finetuned", "base"),
    Operation.STORE: ("adapter", "base"),
    Operation.COPY: ("target",),
    Operation.KEEP: ("target",),
    Operation.BRING: ("finetuned",),
    Operation.MOVE: ("the adapter",),
    Operation.COMPARE: ("finetuned", "base"),
    Operation.DIGEST: ("base",),
    Operation.CONTRAST: ("A", "B"),
    Operation.DISTANCES: ("finetuned", "base", "target", "direct"),
    Operation.RESTORE: ("finetuned", "base", "diff vector"),
    Operation.APPROACH: ("finetuned", "base", "diff vector"),
}
"""The inputs of a task, in order, by operation; direct is optional."""
_WIDER: Mapping[Operation, str] = {
    Operation.TRANSFER: "a smaller --alpha, a wider --out-dtype",
    Operation.APPLY: "a smaller --alpha, a wider --out-dtype",
    Operation.GIVE_BACK: "a wider --out-dtype",
    Operation.SUBTRACT: "a wider --diff-dtype",
    Operation.STORE: "a wider --diff-dtype",
    Operation.COPY: "a wider --out-dtype",
    Operation.BRING: "a wider --diff-dtype",
    Operation.MOVE: "a wider --out-dtype",
}
"""The remedy for an overflow, by operation."""


def not_finite(
    out: memoryview,
    inputs: Sequence[tuple[int, memoryview]],
    pieces: Sequence[Piece],
    chunk: Chunk,
    task: TensorTask,
) -> NonFiniteError:
    """The error for a result with NaN or infinity.

    Arithmetic and casts give one wherever an input has one, so the first one in the result is
    the first of all.

    Args:
        out: the result.
        inputs: its inputs, each with its index among the task's inputs.
        pieces: the pieces of the result, in order.
        chunk: the chunk of the pieces.
        task: the task of the chunk.

    Returns:
        The error; it names the first such element, and the input that has it, if any.
    """
    found = in_float64(elements(out, task.dtype), task.dtype)
    position = int(np.argmin(np.isfinite(found)))
    for slot, data in inputs:
        dtype = task.inputs[slot].dtype
        value = in_float64(elements(data, dtype)[position : position + 1], dtype)[0]
        if not np.isfinite(value):
            return _in_input(task, slot, pieces, position, nan=bool(np.isnan(value)))
    return _overflow(task, chunk, pieces, position)


def _overflow(
    task: TensorTask, chunk: Chunk, pieces: Sequence[Piece], position: int
) -> NonFiniteError:
    piece, inside = _locate(pieces, position)
    index = _index(chunk.start + piece.at + inside, task.shape)
    problem = f"overflows {task.dtype} in the output at {list(index)}"
    wider = _WIDER.get(task.operation)
    options = "--allow-nonfinite" if wider is None else f"{wider}, or --allow-nonfinite"
    remedy = f"give {options} to accept it"
    return NonFiniteError(task.name, "output", index, problem, remedy)


def _in_input(
    task: TensorTask, slot: int, pieces: Sequence[Piece], position: int, *, nan: bool
) -> NonFiniteError:
    piece, inside = _locate(pieces, position)
    spec = task.inputs[slot]
    role = spec.source or _INPUTS[task.operation][slot]
    index = _index(piece.sources[slot] + inside, spec.shape)
    value = "NaN" if nan else "infinity"
    problem = f"{value} in {role} at {list(index)} ({spec.shard.path})"
    return NonFiniteError(spec.name, role, index, problem, _ALLOW)


def _locate(pieces: Sequence[Piece], position: int) -> tuple[Piece, int]:
    """The piece that holds an element, and the element's position in that piece."""
    for piece in pieces:
        if position < piece.count:
            return piece, position
        position -= piece.count
    raise AssertionError("the position lies beyond the pieces")


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()
