"""How large a packed diff vector will be, estimated by packing a few blocks of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.exceptions import joined
from diffxfer.checkpoints.encodings.packed import prefix_bytes
from diffxfer.checkpoints.encodings.packing import BLOCK, LEVELS, BlockEncoder
from diffxfer.checkpoints.files import OpenShard
from diffxfer.diffs.extraction.rounded import rounded, suits
from diffxfer.streaming.plan import Chunk, pieces_of
from diffxfer.streaming.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.checkpoints.encodings.rounding import Rounding
    from diffxfer.streaming.plan import Plan, TensorTask

_SAMPLED = 12
"""Blocks to pack, in about 50 ms."""
_MARGIN = 1.15
"""Other blocks may pack worse than the sampled ones."""


def most_packed_bytes(plan: Plan, level: int = LEVELS[0], rounding: Rounding | None = None) -> int:
    """An estimate of the size of all packed shards, rather too large than too small.

    Args:
        plan: a plan that computes every difference in float64.
        level: the level of compression.
        rounding: the form of packing that loses something; None for the exact one.

    Returns:
        Bytes; if there are only a few blocks, those of the tensors are exact.

    Raises:
        DiffxferError: if an input cannot be read, or has changed.
    """
    tasks = [task for task in plan.tasks if task.shard is not None]
    blocks = sum(-(-task.elements // BLOCK) for task in tasks)
    opened: dict[object, OpenShard] = {}
    worker = Worker(
        BLOCK,
        allow_nonfinite=True,
        open_shard=lambda shard: opened.setdefault(shard.path, OpenShard(shard)),
    )
    encoder, elements, packed = BlockEncoder(level), 0, 0
    for task, block in _spread(tasks, blocks):
        chunk = _chunk(task, block)
        packed += _packed_bytes(worker, encoder, chunk, task, rounding)
        elements += chunk.count
    every = sum(task.elements for task in tasks)
    margin = 1.0 if elements == every else _MARGIN
    # The header of a packed shard is about as long, and matters for many small tensors.
    size = sum(len(layout.header) for layout in plan.layouts.values())
    size += sum(prefix_bytes(task.elements) for task in tasks)
    return size + math.ceil(packed * every / max(elements, 1) * margin)


def _spread(tasks: list[TensorTask], blocks: int) -> Iterator[tuple[TensorTask, int]]:
    """Every block if there are few, else some that are spread evenly over all of them."""
    ends = list(accumulate(-(-task.elements // BLOCK) for task in tasks))
    count = min(blocks, _SAMPLED)
    for number in range(count):
        place = (2 * number + 1) * blocks // (2 * count)
        index = bisect_right(ends, place)
        yield tasks[index], place - (ends[index - 1] if index else 0)


def _chunk(task: TensorTask, block: int) -> Chunk:
    start = block * BLOCK
    count = min(BLOCK, task.elements - start)
    run_starts = [run.start * task.row_elements for run in task.runs]
    return Chunk(0, 0, start, count, pieces_of(task, run_starts, start, count))


def _packed_bytes(
    worker: Worker,
    encoder: BlockEncoder,
    chunk: Chunk,
    task: TensorTask,
    rounding: Rounding | None,
) -> int:
    data, result = worker.process(chunk, task)
    values = np.frombuffer(data, np.float64)
    if rounding is not None:
        made = (
            rounded(encoder, rounding, task, chunk.start // BLOCK, values) if suits(task) else None
        )
        return len(encoder.encode_planes(values) if made is None else made[0])
    with np.errstate(all="ignore"):
        singles = values.astype(np.float32)
        is_exact = np.array_equal(singles.astype(np.float64), values, equal_nan=True)
    block = encoder.encode(singles if is_exact else values)
    if result.exceptions:
        block = encoder.add_exceptions(block, joined(list(result.exceptions)), chunk.count)
    return len(block)
