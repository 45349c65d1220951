"""Plans: how every element of an output is computed, as data.

A plan is made from headers alone and holds no tensor data. It is a list of `TensorTask`, one per
output tensor; each states the operation, the inputs and the place of the result. `chunks` cuts it
lazily into chunks that fit a buffer: a model of 1T parameters has millions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import TYPE_CHECKING

from diffxfer.checkpoints.layout import ShardLayout, layout_shard
from diffxfer.checkpoints.stored import BITS, ShardFile, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

BLOCK_ELEMENTS = 1 << 18
"""Elements per checksum block. It is part of the format: other blocks give other checksums.

It is also the size of a chunk on a CPU: half a MiB of bfloat16 per input, so that the inputs and
their float64 copies stay in the caches; 4 MiB chunks took two to four times as long.
"""


class RunKind(Enum):
    """How a run of output rows is made."""

    GRAFT = "graft"
    """Arithmetic on every input."""
    COPY = "copy"
    """The last input's rows (the target's), unchanged."""
    ADD = "add"
    """The first input's rows (finetuned's), whole: tokens that it added."""
    ZERO = "zero"
    """Zeros: rows of a diff vector that belong to no token."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive output rows that are made in the same way.

    Attributes:
        kind: how they are made.
        start: the first output row.
        count: number of rows.
        rows: the first row in each input of the task, −1 if that input is not used.
    """

    kind: RunKind
    start: int
    count: int
    rows: tuple[int, ...]


class Operation(Enum):
    """The operation of a task."""

    TRANSFER = "transfer"
    """target + α·(finetuned − base)"""
    APPLY = "apply"
    """target + α·Δ"""
    GIVE_BACK = "give back"
    """target + Δ where the target is base: finetuned, bit for bit"""
    SUBTRACT = "subtract"
    """finetuned − base"""
    EXACT = "exact"
    """finetuned − base, and finetuned's bits of the elements that base + Δ does not give back"""
    STORE = "store"
    """Δ that is stored itself, in another dtype"""
    COPY = "copy"
    """The target's bytes, or its values in another dtype."""
    KEEP = "keep"
    """The target's bytes, unchecked: a buffer may hold infinity."""
    BRING = "bring"
    """Finetuned's bytes: a tensor that no other role has."""
    MOVE = "move"
    """The adapter's bytes, or its values in another dtype."""
    COMPARE = "compare"
    """Writes nothing: both inputs must hold the same bytes."""
    DIGEST = "digest"
    """Writes nothing: the checksum of a tensor that no other task reads in order."""
    CONTRAST = "contrast"
    """Writes nothing: how much A and B differ, by value, or by byte if they are U8."""
    DISTANCES = "distances"
    """Writes nothing: how far the roles are from each other, in length and direction."""
    RESTORE = "restore"
    """Writes nothing: whether base + Δ gives finetuned back, and the checksums of Δ and base."""
    APPROACH = "approach"
    """The same, and how far base + Δ is from finetuned: Δ is stored with a loss."""


@dataclass(frozen=True, slots=True)
class TensorTask:
    """The work on one tensor.

    Attributes:
        name: the output's name, or an input's if nothing is written.
        operation: the operation.
        inputs: the tensors that it reads, as the operation names them.
        dtype: the output's dtype.
        shape: the output's shape.
        alpha: the scale of Δ.
        runs: how rows are made; the runs cover the output in order.
        shard: the output file, None if nothing is written.
        start: the output's first byte in that file.
        sample: the elements of base to sample, as ascending indices of the output.
        expected: the checksum that the first input must have, if it is known.
    """

    name: str
    operation: Operation
    inputs: tuple[StoredTensor, ...]
    dtype: str
    shape: tuple[int, ...]
    alpha: float = 1.0
    runs: tuple[Run, ...] = ()
    shard: str | None = None
    start: int = 0
    sample: Sequence[int] = ()
    expected: str | None = None

    @property
    def elements(self) -> int:
        """The output's number of elements."""
        return math.prod(self.shape)

    @property
    def row_elements(self) -> int:
        """Elements per row of the runs."""
        rows = self.runs[-1].start + self.runs[-1].count
        return self.elements // rows if rows else 0

    @property
    def itemsize(self) -> int:
        """Bytes per output element."""
        return BITS[self.dtype] // 8


@cache  # one object for all tensors of a model: each takes 250 bytes
def whole(kind: RunKind, inputs: int) -> tuple[Run, ...]:
    """The runs of a tensor whose elements are all made in the same way: one run of one row."""
    return (Run(kind, 0, 1, (0,) * inputs),)


def digest_task(name: str, stored: StoredTensor, expected: str | None = None) -> TensorTask:
    """The task that computes a tensor's checksum, and writes nothing.

    Args:
        name: the task's name.
        stored: the tensor.
        expected: the checksum that it must have, if that is known.
    """
    runs = whole(RunKind.GRAFT, 1)
    shape, dtype = stored.shape, stored.dtype
    return TensorTask(name, Operation.DIGEST, (stored,), dtype, shape, runs=runs, expected=expected)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a chunk in one run.

    Attributes:
        kind: how it is made.
        at: its first element within the chunk.
        count: number of elements.
        sources: its first element in each input, negative if that input is not used.
    """

    kind: RunKind
    at: int
    count: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive elements of one output tensor.

    Attributes:
        number: its position among all chunks of the plan.
        task: its task, as an index of the plan's tasks.
        start: its first element in the output tensor, a multiple of `BLOCK_ELEMENTS`.
        count: number of elements.
        pieces: its pieces, which cover it in order.
    """

    number: int
    task: int
    start: int
    count: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """All the work of a run, known before it begins.

    Attributes:
        tasks: tasks that write nothing first, then shard by shard in file order.
        layouts: every output shard by file name.
        inputs: every file that is read.
        first_chunk: the number of its first chunk: a part of a plan keeps the numbers of the whole.
    """

    tasks: tuple[TensorTask, ...]
    layouts: Mapping[str, ShardLayout]
    inputs: tuple[ShardFile, ...]
    first_chunk: int = 0

    @property
    def bytes_to_write(self) -> int:
        """The size of all output shards."""
        return sum(layout.size for layout in self.layouts.values())

    @cached_property
    def bytes_to_read(self) -> int:
        """The size of all reads."""
        return sum(bytes_read(task) for task in self.tasks)


def inputs_used(kind: RunKind, inputs: int) -> range:
    """The indices of the task's inputs that a piece reads.

    Args:
        kind: how the piece is made.
        inputs: the task's number of inputs.
    """
    if kind is RunKind.GRAFT:
        return range(inputs)
    if kind is RunKind.COPY:
        return range(inputs - 1, inputs)
    return range(1 if kind is RunKind.ADD else 0)


def bytes_read(task: TensorTask) -> int:
    """The bytes that a task reads from its inputs."""
    if len(task.runs) == 1:
        elements, slots = task.elements, inputs_used(task.runs[0].kind, len(task.inputs))
        return sum([task.inputs[slot].bytes_to_read(elements) for slot in slots])
    width = task.row_elements
    return sum(
        task.inputs[slot].bytes_to_read(run.count * width)
        for run in task.runs
        for slot in inputs_used(run.kind, len(task.inputs))
    )


def make_plan(tasks: Sequence[TensorTask], inputs: Sequence[ShardFile]) -> Plan:
    """Lay out the output shards and put the tasks in the order of their files.

    Args:
        tasks: every task, its `start` not yet known.
        inputs: every file that is read.

    Returns:
        The plan, each task with its place.
    """
    by_shard: dict[str, list[TensorTask]] = {}
    silent: list[TensorTask] = []
    for task in tasks:
        if task.shard is None:
            silent.append(task)
        else:
            by_shard.setdefault(task.shard, []).append(task)
    names = {task.name for shard in by_shard.values() for task in shard}
    assert len(names) == len(tasks) - len(silent), "a tensor is written twice"
    layouts = {
        shard: layout_shard((task.name, task.dtype, task.shape) for task in by_shard[shard])
        for shard in sorted(by_shard)
    }
    placed = [
        _place(task, layouts[shard].starts[task.name])
        for shard in layouts
        for task in sorted(by_shard[shard], key=lambda t: layouts[shard].starts[t.name])
    ]
    return Plan((*silent, *placed), layouts, tuple(inputs))


def _place(task: TensorTask, start: int) -> TensorTask:
    # `dataclasses.replace` takes ten times as long, which is noticeable for 60,000 tensors.
    return TensorTask(
        *(task.name, task.operation, task.inputs, task.dtype, task.shape, task.alpha),
        *(task.runs, task.shard, start, task.sample, task.expected),
    )


def chunks_of(task: TensorTask, chunk_elements: int) -> int:
    """The number of chunks of a task."""
    return -(-task.elements // step_of(task, chunk_elements))


def step_of(task: TensorTask, chunk_elements: int) -> int:
    """The number of elements of a task's chunks, except the last."""
    # With several runs, a chunk is one block, so that sums by block stay simple.
    return chunk_elements if len(task.runs) == 1 else BLOCK_ELEMENTS


def chunks(
    plan: Plan, chunk_elements: int = BLOCK_ELEMENTS, done: Container[int] = ()
) -> Iterator[Chunk]:
    """Cut a plan into chunks, lazily.

    Args:
        plan: the plan.
        chunk_elements: the most elements of a chunk, a multiple of `BLOCK_ELEMENTS`.
        done: numbers of chunks to skip.

    Yields:
        Every chunk not in `done`, in the order of the tasks and of their elements.
    """
    number = plan.first_chunk
    for index, task in enumerate(plan.tasks):
        elements, step = task.elements, step_of(task, chunk_elements)
        run_starts = [run.start * task.row_elements for run in task.runs]
        for start in range(0, elements, step):
            if number not in done:
                count = min(step, elements - start)
                pieces = pieces_of(task, run_starts, start, count)
                yield Chunk(number, index, start, count, pieces)
            number += 1


def pieces_of(
    task: TensorTask, run_starts: Sequence[int], start: int, count: int
) -> tuple[Piece, ...]:
    """The pieces of some elements of an output; `run_starts` has the first one of each run."""
    width = task.row_elements
    pieces = []
    position, stop = start, start + count
    index = bisect_right(run_starts, start) - 1
    while position < stop:
        run = task.runs[index]
        end = min(stop, run_starts[index] + run.count * width)
        inside = position - run_starts[index]
        sources = tuple(row * width + inside if row >= 0 else -1 for row in run.rows)
        pieces.append(Piece(run.kind, position - start, end - position, sources))
        position = end
        index += 1
    return tuple(pieces)
