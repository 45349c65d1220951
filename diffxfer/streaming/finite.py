"""Refusing NaN, infinity and overflow, by the name of the tensor and its first such element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffxfer.errors import NonFiniteError
from diffxfer.streaming import ops
from diffxfer.streaming.plan import INPUTS, Chunk, Operation, Piece, TensorTask

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALLOW = "mend the checkpoint, or give --allow-nonfinite to let it through"
_WIDER: Mapping[Operation, str] = {
    Operation.TRANSFER: "a smaller --alpha or a wider dtype",
    Operation.APPLY: "a smaller --alpha or a wider dtype",
    Operation.SUBTRACT: "a wider --diff-dtype",
    Operation.COPY: "a wider --out-dtype",
}
"""What keeps the result of an operation from overflowing."""


def check_finite(
    out: Tensor,
    inputs: list[tuple[int, Tensor]],
    pieces: list[Piece],
    chunk: Chunk,
    task: TensorTask,
) -> None:
    """Make sure that a result has no NaN and no infinity.

    Arithmetic and casts give one wherever an input has one, so the first in the result is the
    first of all.

    Args:
        out: the result, shape `(n,)`.
        inputs: what it was made from, each with its place among the task's inputs.
        pieces: what the elements are, one piece after the other.
        chunk: what the pieces are a part of.
        task: what the chunk is a part of.

    Raises:
        NonFiniteError: naming the first such element, and the input that has it if one has.
    """
    if ops.all_finite(out):
        return
    position = ops.first(torch.isfinite(out).logical_not_())
    assert position is not None
    for slot, values in inputs:
        if not torch.isfinite(values[position]):
            raise _in_input(task, slot, pieces, position, values)
    raise _overflow(task, chunk, pieces, position)


def _overflow(task: TensorTask, chunk: Chunk, pieces: list[Piece], position: int) -> NonFiniteError:
    piece, inside = _locate(pieces, position)
    index = _index(chunk.start + piece.at + inside, task.shape)
    problem = f"overflows {task.dtype} in the output at {list(index)}"
    remedy = f"give {_WIDER[task.operation]}, or --allow-nonfinite to let it through"
    return NonFiniteError(task.name, "output", index, problem, remedy)


def _in_input(
    task: TensorTask, slot: int, pieces: list[Piece], position: int, values: Tensor
) -> NonFiniteError:
    piece, inside = _locate(pieces, position)
    spec, role = task.inputs[slot], INPUTS[task.operation][slot]
    index = _index(piece.sources[slot] + inside, spec.shape)
    value = "NaN" if bool(torch.isnan(values[position])) else "infinity"
    problem = f"{value} in {role} at {list(index)} ({spec.shard.path})"
    return NonFiniteError(spec.name, role, index, problem, _ALLOW)


def _locate(pieces: list[Piece], position: int) -> tuple[Piece, int]:
    """The piece that holds an element, and the element's place within that piece."""
    for piece in pieces:
        if position < piece.count:
            return piece, position
        position -= piece.count
    raise AssertionError("the position lies beyond the pieces")


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()
