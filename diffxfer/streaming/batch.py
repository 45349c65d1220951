"""Small tensors in one go: a mixture of experts has tens of thousands.

Every call costs a microsecond or more, and with several threads every call that lets go of Python's
lock costs a wait to get it back: one by one, tensors of 4 KiB took 71 µs each on one thread and
160 µs on two. What is alike and lies side by side in the output is read, computed and written at
once instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation, RunKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    """What must be equal where tensors come together, None for a chunk that stays alone."""
    if (
        chunk.count > _SMALL
        or len(task.runs) != 1
        or chunk.pieces[0].kind is not RunKind.GRAFT
        or task.operation not in COMPUTED
        or chunk.count != task.elements
    ):
        return None
    dtypes = tuple([spec.dtype for spec in task.inputs])
    return task.operation, task.alpha, task.shard, task.dtype, dtypes
