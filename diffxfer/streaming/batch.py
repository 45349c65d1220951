"""Small tensors in one go: a mixture of experts has tens of thousands.

Every call costs a microsecond or more, and with several threads every call that lets go of Python's
lock costs a wait to get it back: one by one, tensors of 4 KiB took 71 µs each on one thread and
160 µs on two. What is alike and lies side by side in the output is read, computed and written at
once instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import BITS
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation, RunKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.streaming.plan import Chunk, Plan, TensorTask

_SMALL = BLOCK_ELEMENTS // 4
COMPUTED = (Operation.TRANSFER, Operation.APPLY, Operation.SUBTRACT)
"""What is arithmetic."""


def batches(chunks: Iterable[Chunk], plan: Plan) -> Iterator[tuple[Chunk, ...]]:
    """Put small tensors together, each of which is one chunk.

    Args:
        chunks: of the plan, in its order.
        plan: what they are cut from.

    Yields:
        Every chunk, in the same order. Those that come together are whole tensors, alike in all
        but their names, shapes and sources; their outputs lie side by side in one shard, and have
        no more than `BLOCK_ELEMENTS` elements.
    """
    batch: list[Chunk] = []
    elements, end, kind = 0, -1, None
    for chunk in chunks:
        task = plan.tasks[chunk.task]
        found = _kind(chunk, task)
        if batch and (
            found != kind or task.start != end or elements + chunk.count > BLOCK_ELEMENTS
        ):
            yield tuple(batch)
            batch, elements = [], 0
        if found is None:
            yield (chunk,)
            continue
        batch.append(chunk)
        elements += chunk.count
        kind, end = found, task.start + chunk.count * task.itemsize
    if batch:
        yield tuple(batch)


def _kind(chunk: Chunk, task: TensorTask) -> tuple[object, ...] | None:
    if chunk.count > _SMALL or len(task.runs) != 1 or chunk.count != task.elements:
        return None
    return alike(chunk, task)


def alike(chunk: Chunk, task: TensorTask) -> tuple[object, ...] | None:
    """What must be equal where chunks come together, None for one that is not all arithmetic.

    Args:
        chunk: which elements.
        task: what it is a part of.
    """
    if task.operation not in COMPUTED or [p.kind for p in chunk.pieces] != [RunKind.GRAFT]:
        return None
    dtypes = tuple([spec.dtype for spec in task.inputs])
    return task.operation, task.alpha, task.shard, task.dtype, dtypes


def spans(
    chunks: Sequence[Chunk], tasks: Sequence[TensorTask], place: int
) -> Iterator[tuple[TensorSpec, int, int]]:
    """Where what is computed of some chunks lies on disk, neighbours as one.

    Args:
        chunks: they.
        tasks: what each is a part of.
        place: which of their inputs.

    Yields:
        A tensor of the file, the first byte in it, and the one after the last.
    """
    found, begin, end = tasks[0].inputs[place], 0, 0
    size = BITS[found.dtype] // 8
    for chunk, task in zip(chunks, tasks, strict=True):
        spec = task.inputs[place]
        for piece in chunk.pieces:
            if piece.kind is RunKind.GRAFT:
                start = spec.start + piece.sources[place] * size
                if start != end or spec.shard is not found.shard:
                    if end > begin:
                        yield found, begin, end
                    found, begin = spec, start
                end = start + piece.count * size
    yield found, begin, end
