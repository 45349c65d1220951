"""Parts of a plan: what one process, perhaps on another machine, does of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan, TensorTask, bytes_read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.streaming.completed import ChunkSet

PART_BYTES, LEAST_PART_BYTES = 10_000_000_000, 500_000_000
"""The most and the least bytes that a part reads and writes by default, about: seconds of work,
against milliseconds to hand it out."""
PARTS_PER_PLACE = 4
"""In a plan that is small for its cluster, so that all nodes end at about the same time."""


@dataclass(frozen=True, slots=True)
class Workload:
    """How every part of a plan is run.

    Attributes:
        out: the output folder, for messages.
        partial: the partial folder, which every node sees under this path; None if the plan writes
            nothing.
        fingerprint: the job's fingerprint, 16 bytes.
        run: the run's token, which the journals of its parts have in their names.
        threads: number of workers of a part.
        device: where the arithmetic runs.
        device_memory: the most bytes to allocate on a GPU.
        allow_nonfinite: let NaN, infinity and overflow through.
        chunk_elements: the most elements of a chunk, a multiple of `plan.BLOCK_ELEMENTS`.
    """

    out: Path
    partial: Path | None
    fingerprint: bytes
    run: str
    threads: int
    device: str
    device_memory: int
    allow_nonfinite: bool
    chunk_elements: int = BLOCK_ELEMENTS


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tasks of a plan.

    Attributes:
        plan: the tasks, with the files that they read and write.
        done: the numbers of chunks that are done already.
        load: how it is run.
    """

    plan: Plan
    done: frozenset[int]
    load: Workload

    @property
    def nbytes(self) -> int:
        """The bytes that all its tasks read and write."""
        return sum(moved_by(task) for task in self.plan.tasks)


def moved_by(task: TensorTask) -> int:
    """The bytes that a task reads and writes."""
    return bytes_read(task) + (task.elements * task.itemsize if task.shard is not None else 0)


def cut(plan: Plan, done: ChunkSet, load: Workload, part_bytes: int) -> Iterator[Part]:
    """Cut a plan into parts of whole tensors; tensors that are done are left out.

    A part ends where an output shard ends, or where it has its bytes. So a tensor of more bytes is
    a part alone.

    Args:
        plan: the plan.
        done: the chunks that are done.
        load: how the parts are run.
        part_bytes: the bytes that a part reads and writes, about.

    Yields:
        The parts, in order. Together they have every chunk that is not done.
    """
    begin, size = 0, 0
    for index, task in enumerate(plan.tasks):
        moved = moved_by(task)
        other = index > begin and task.shard != plan.tasks[index - 1].shard
        # Small shards go together: a task of the cluster for each would cost more than its work.
        if index > begin and (size + moved > part_bytes or (other and 2 * size > part_bytes)):
            yield from _part(plan, done, load, begin, index)
            begin, size = index, 0
        size += moved
    yield from _part(plan, done, load, begin, len(plan.tasks))


def _part(plan: Plan, done: ChunkSet, load: Workload, begin: int, end: int) -> Iterator[Part]:
    """The part of some tasks, without those at its ends that are done; none if all are."""
    # A task without elements has no chunks: it stays, since every task has a result.
    while begin < end and done.first[begin] < done.first[begin + 1] and done.has_all(begin):
        begin += 1
    while begin < end and done.first[end - 1] < done.first[end] and done.has_all(end - 1):
        end -= 1
    if begin == end:
        return
    tasks = plan.tasks[begin:end]
    layouts = {task.shard: plan.layouts[task.shard] for task in tasks if task.shard is not None}
    first, stop = done.first[begin], done.first[end]
    known = frozenset(number for number in range(first, stop) if number in done)
    yield Part(Plan(tasks, layouts, _inputs(tasks), first), known, load)


def _inputs(tasks: Sequence[TensorTask]) -> tuple[ShardFile, ...]:
    """The files that tasks read."""
    found = {part.shard.path: part.shard for t in tasks for i in t.inputs for part in i.parts}
    return tuple(found.values())
