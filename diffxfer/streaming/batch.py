"""Processing small tensors in batches: a mixture of experts has tens of thousands.

Every call costs a microsecond or more, and with several threads every call that releases the GIL
waits to get it back: one by one, tensors of 4 KiB took 71 µs each on one thread and 160 µs on two.
So similar tensors that are adjacent in the output are read, computed and written together.
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
"""The operations with arithmetic."""


def batches(chunks: Iterable[Chunk], plan: Plan) -> Iterator[tuple[Chunk, ...]]:
    """Group small tensors that are one chunk each.

    Args:
        chunks: the plan's chunks, in order.
        plan: the plan.

    Yields:
        Every chunk, in the same order. The chunks of a batch are whole tensors that differ only in
        names, shapes and sources; their outputs are adjacent in one shard, and have at most
        `BLOCK_ELEMENTS` elements in total.
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
    """The key that chunks of a batch share, None for a chunk that is not all arithmetic.

    Args:
        chunk: the chunk.
        task: its task.
    """
    if task.operation not in COMPUTED or [p.kind for p in chunk.pieces] != [RunKind.GRAFT]:
        return None
    dtypes = tuple([spec.dtype for spec in task.inputs])
    return task.operation, task.alpha, task.shard, task.dtype, dtypes


def spans(
    chunks: Sequence[Chunk], tasks: Sequence[TensorTask], place: int
) -> Iterator[tuple[TensorSpec, int, int]]:
    """The byte ranges on disk of one input of the grafted pieces; adjacent ranges are joined.

    Args:
        chunks: the chunks.
        tasks: the task of each.
        place: the index of the input.

    Yields:
        A tensor in the file, the range's first byte in the file, and the byte after its last.
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
