"""Plans: what becomes of every element of an output, as data.

A plan is made from headers alone and holds no tensor. It is a list of `TensorTask`, one an output
tensor, each of which says what is computed from which inputs and where the result lands; `chunks`
cuts it, as it is needed, into pieces that fit a buffer: a model of 1T parameters has millions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import BITS, ShardFile, TensorSpec
from diffxfer.checkpoints.layout import ShardLayout, layout_shard

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

BLOCK_ELEMENTS = 1 << 18
"""Elements of a checksum's block. Part of the format: other blocks give other checksums.

It is also the size of a chunk on a CPU: half a MiB of bfloat16 an input, so that the inputs and
their float64 copies stay in the caches; 4 MiB chunks took two to four times as long.
"""


class RunKind(Enum):
    """What becomes of a run of output rows."""

    GRAFT = "graft"
    """Arithmetic on every input."""
    COPY = "copy"
    """The last input's rows (the target's), untouched."""
    ADD = "add"
    """The first input's rows (finetuned's own), whole: tokens that it added."""
    ZERO = "zero"
    """Zeros: rows of a diff vector that belong to no token."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive output rows that are treated alike.

    Attributes:
        kind: what becomes of them.
        start: the first output row.
        count: how many.
        rows: the first row in each input of the task, −1 where that input has no part.
    """

    kind: RunKind
    start: int
    count: int
    rows: tuple[int, ...]


class Operation(Enum):
    """What a task computes."""

    TRANSFER = "transfer"
    """target + α·(finetuned − base)"""
    APPLY = "apply"
    """target + α·Δ"""
    SUBTRACT = "subtract"
    """finetuned − base"""
    COPY = "copy"
    """The target's bytes, or its values in another dtype."""
    KEEP = "keep"
    """The target's bytes, whatever they are: a buffer may well hold infinity."""
    BRING = "bring"
    """Finetuned's bytes: a tensor that no other role has."""
    COMPARE = "compare"
    """Writes nothing: both inputs must hold the same bytes."""
    DIGEST = "digest"
    """Writes nothing: the checksum of a tensor that no other task reads in its own order."""
    CONTRAST = "contrast"
    """Writes nothing: how much A and B differ, by value, or where they are U8 by byte."""
    RESTORE = "restore"
    """Writes nothing: how much of finetuned base + Δ gives back, and the checksums of Δ and base"""


INPUTS: Mapping[Operation, tuple[str, ...]] = {
    Operation.TRANSFER: ("finetuned", "base", "target"),
    Operation.APPLY: ("diff vector", "target"),
    Operation.SUBTRACT: ("finetuned", "base"),
    Operation.COPY: ("target",),
    Operation.KEEP: ("target",),
    Operation.BRING: ("finetuned",),
    Operation.COMPARE: ("finetuned", "base"),
    Operation.DIGEST: ("base",),
    Operation.CONTRAST: ("A", "B"),
    Operation.RESTORE: ("finetuned", "base", "diff vector"),
}
"""What the inputs of a task are, in their order."""


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One tensor's work.

    Attributes:
        name: the output's name (of an input, where nothing is written).
        operation: what is computed.
        inputs: the tensors that it reads, as the operation names them.
        dtype: of the output.
        shape: of the output.
        alpha: the scale of Δ.
        runs: which rows are treated how; they cover the output in order.
        shard: the output file, None where nothing is written.
        start: the output's first byte in that file.
        sample: which elements of base are to be kept, ascending, as indices of the output.
    """

    name: str
    operation: Operation
    inputs: tuple[TensorSpec, ...]
    dtype: str
    shape: tuple[int, ...]
    alpha: float = 1.0
    runs: tuple[Run, ...] = ()
    shard: str | None = None
    start: int = 0
    sample: Sequence[int] = ()

    @property
    def elements(self) -> int:
        """How many elements the output has."""
        return math.prod(self.shape)

    @property
    def row_elements(self) -> int:
        """How many elements a row of the runs has."""
        rows = self.runs[-1].start + self.runs[-1].count
        return self.elements // rows if rows else 0

    @property
    def itemsize(self) -> int:
        """Bytes of an output element."""
        return BITS[self.dtype] // 8


@cache  # one for all tensors of a model: each took 250 bytes
def whole(kind: RunKind, inputs: int) -> tuple[Run, ...]:
    """The runs of a tensor that is treated alike from end to end: one row, one run."""
    return (Run(kind, 0, 1, (0,) * inputs),)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a chunk that lies in one run.

    Attributes:
        kind: what becomes of it.
        at: its first element within the chunk.
        count: its elements.
        sources: its first element in each input, negative where that input has no part.
    """

    kind: RunKind
    at: int
    count: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive elements of one output tensor.

    Attributes:
        number: its place among all chunks of the plan.
        task: what it is a part of, as an index of the plan's tasks.
        start: its first element in the output tensor, a multiple of `BLOCK_ELEMENTS`.
        count: its elements.
        pieces: its parts, which cover it in order.
    """

    number: int
    task: int
    start: int
    count: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a run does, known before it begins.

    Attributes:
        tasks: first those that write nothing, then shard by shard in the order of the file.
        layouts: every output shard by file name.
        inputs: every file that is read.
    """

    tasks: tuple[TensorTask, ...]
    layouts: Mapping[str, ShardLayout]
    inputs: tuple[ShardFile, ...]

    @property
    def bytes_to_write(self) -> int:
        """The size of all output shards."""
        return sum(layout.size for layout in self.layouts.values())

    @cached_property
    def bytes_to_read(self) -> int:
        """The size of all reads."""
        return sum(bytes_read(task) for task in self.tasks)


def inputs_used(kind: RunKind, inputs: int) -> range:
    """Which inputs of a task a piece reads, by their places.

    Args:
        kind: what becomes of the piece.
        inputs: how many the task has.
    """
    if kind is RunKind.GRAFT:
        return range(inputs)
    if kind is RunKind.COPY:
        return range(inputs - 1, inputs)
    return range(1 if kind is RunKind.ADD else 0)


def bytes_read(task: TensorTask) -> int:
    """How many bytes of its inputs a task reads."""
    if len(task.runs) == 1:
        kind, elements = task.runs[0].kind, task.elements
        slots = inputs_used(kind, len(task.inputs))
        return sum([elements * BITS[task.inputs[slot].dtype] // 8 for slot in slots])
    width = task.row_elements
    return sum(
        run.count * width * BITS[task.inputs[slot].dtype] // 8
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
    # `dataclasses.replace` takes ten times as long, which 60,000 tensors would feel.
    return TensorTask(
        *(task.name, task.operation, task.inputs, task.dtype, task.shape, task.alpha),
        *(task.runs, task.shard, start, task.sample),
    )


def chunks_of(task: TensorTask, chunk_elements: int) -> int:
    """How many chunks a task is cut into."""
    return -(-task.elements // step_of(task, chunk_elements))


def step_of(task: TensorTask, chunk_elements: int) -> int:
    """How many elements a task's chunks have, but for the last."""
    # Where rows are treated differently, a chunk is one block, so that sums by block stay simple.
    return chunk_elements if len(task.runs) == 1 else BLOCK_ELEMENTS


def chunks(
    plan: Plan, chunk_elements: int = BLOCK_ELEMENTS, done: Container[int] = ()
) -> Iterator[Chunk]:
    """Cut a plan into chunks, one after the other as they are asked for.

    Args:
        plan: what to cut.
        chunk_elements: the most elements of a chunk, a multiple of `BLOCK_ELEMENTS`.
        done: numbers of chunks to pass over.

    Yields:
        Every other chunk, in the order of the tasks and of their elements.
    """
    assert chunk_elements % BLOCK_ELEMENTS == 0
    number = 0
    for index, task in enumerate(plan.tasks):
        elements, step = task.elements, step_of(task, chunk_elements)
        run_starts = [run.start * task.row_elements for run in task.runs]
        for start in range(0, elements, step):
            if number not in done:
                count = min(step, elements - start)
                pieces = _pieces(task, run_starts, start, count)
                yield Chunk(number, index, start, count, pieces)
            number += 1


def _pieces(
    task: TensorTask, run_starts: Sequence[int], start: int, count: int
) -> tuple[Piece, ...]:
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
