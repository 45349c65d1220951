"""Processing small tensors in batches: a mixture of experts has tens of thousands.

Every call costs a microsecond or more, and with several threads every call that releases the GIL
waits to get it back: one by one, tensors of 4 KiB took 71 µs each on one thread and 160 µs on two.
So similar tensors that are adjacent in the output are read, computed and written together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import BITS
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation, RunKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffxfer.checkpoints.stored import Files
    from diffxfer.streaming.plan import Chunk, Plan, TensorTask

_SMALL = BLOCK_ELEMENTS // 4
COMPUTED = (Operation.TRANSFER, Operation.APPLY, Operation.SUBTRACT, Operation.EXACT)
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


def read_grafted(
    files: Files,
    chunks: Sequence[Chunk],
    tasks: Sequence[TensorTask],
    place: int,
    buffer: memoryview,
) -> None:
    """Read one input of the grafted pieces, one after the other.

    Pieces that are stored as they are, and are adjacent on disk, are read at once.

    Args:
        files: the files of this thread.
        chunks: the chunks.
        tasks: the task of each.
        place: the index of the input.
        buffer: receives the elements.

    Raises:
        CheckpointError: if an input cannot be read, or has changed.
    """
    size = BITS[tasks[0].inputs[place].dtype] // 8
    shard, begin, end = tasks[0].inputs[place].shard, 0, 0
    filled = 0

    def flush() -> None:
        nonlocal filled
        if end > begin:
            files.open(shard).read_into(buffer[filled : filled + end - begin], begin)
            filled += end - begin

    for chunk, task in zip(chunks, tasks, strict=True):
        stored = task.inputs[place]
        for piece in chunk.pieces:
            if piece.kind is not RunKind.GRAFT:
                continue
            span = stored.span(piece.sources[place], piece.count)
            if span is None:
                flush()
                begin = end
                stop = filled + piece.count * size
                stored.read(files, piece.sources[place], buffer[filled:stop])
                filled = stop
                continue
            if span[0] != end or stored.shard is not shard:
                flush()
                shard, begin = stored.shard, span[0]
            end = span[1]
    flush()
