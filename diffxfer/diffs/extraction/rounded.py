"""Which blocks of a lossy diff vector are rounded, and which stay exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.encodings.packing import BLOCK
from diffxfer.streaming.plan import RunKind

if TYPE_CHECKING:
    from diffxfer.checkpoints.encodings.packing import BlockEncoder
    from diffxfer.checkpoints.encodings.rounding import Rounding
    from diffxfer.checkpoints.encodings.symbols import Doubles
    from diffxfer.streaming.plan import TensorTask

_LEAST_ROW = 32


def suits(task: TensorTask) -> bool:
    """Whether a tensor may be rounded: vectors and short rows are exact, since they cost little.

    Args:
        task: the task that computes Δ.
    """
    return len(task.shape) > 1 and task.shape[-1] >= _LEAST_ROW


def rounded(
    encoder: BlockEncoder, rounding: Rounding, task: TensorTask, block: int, values: Doubles
) -> tuple[bytes, Doubles] | None:
    """Round a block of Δ.

    Args:
        encoder: compresses it.
        rounding: the lossy form.
        task: the task that computes Δ.
        block: its number in the tensor.
        values: its values.

    Returns:
        The packed block, and the values that it decodes to; None if it must be exact.
    """
    start, width = block * BLOCK, task.shape[-1]
    if _has_added_rows(task, start, len(values)):
        return None
    return encoder.encode_rounded(values, rounding, start % width, width)


def _has_added_rows(task: TensorTask, start: int, count: int) -> bool:
    """Whether some elements belong to tokens that finetuned added: no Δ, but the whole row."""
    width = task.row_elements
    return any(
        run.kind is RunKind.ADD
        and run.start * width < start + count
        and start < (run.start + run.count) * width
        for run in task.runs
    )
