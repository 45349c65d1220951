"""The completed chunks of a plan: in memory, and in the journal for a run that resumes.

The journal holds all results of a chunk that the manifest needs, so a completed chunk is neither
read nor computed again.
"""

from __future__ import annotations

import struct
import threading
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from diffxfer.checkpoints.journal import JOURNAL_NAME, Done
from diffxfer.checkpoints.writer import write_error
from diffxfer.streaming.plan import chunks_of, step_of
from diffxfer.streaming.statistics import ChunkResult, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.plan import Chunk, Plan

_COUNTS = struct.Struct("<2Q4I")
_NOTE_SIZE = struct.Struct("<I")


def pack(result: ChunkResult) -> bytes:
    """Pack a chunk's result into bytes; floats keep every bit.

    Args:
        result: the result.
    """
    digests, squares = result.digests, result.delta_squares + result.base_squares
    counts = len(digests), len(result.input_digests), len(result.delta_squares), len(result.samples)
    head = _COUNTS.pack(result.inexact, result.unchanged, *counts)
    head += digests + result.input_digests
    if not squares and not result.samples:
        return head
    flat = [value for sample in result.samples for value in sample]
    return head + struct.pack(f"<{len(squares)}d" + "Qd" * len(result.samples), *squares, *flat)


def unpack(payload: bytes) -> ChunkResult:
    """The result that `pack` packed.

    Args:
        payload: the bytes.
    """
    inexact, unchanged, digests, input_digests, blocks, samples = _COUNTS.unpack_from(payload)
    at = _COUNTS.size + digests
    layout = f"<{2 * blocks}d" + "Qd" * samples
    found = struct.unpack_from(layout, payload, at + input_digests)
    flat = found[2 * blocks :]
    return ChunkResult(
        payload[_COUNTS.size : at],
        payload[at : at + input_digests],
        inexact,
        unchanged,
        found[:blocks],
        found[blocks : 2 * blocks],
        tuple(zip(flat[::2], flat[1::2], strict=True)),
    )


class Notes(Protocol):
    """What processes the output of chunks further, and must know on resume what it made of them."""

    def note(self, chunk: Chunk) -> bytes:
        """What to record of a chunk that is done; it may be empty."""

    def recall(self, task: int, start: int, note: bytes) -> None:
        """Take up a chunk that an earlier run has done.

        Args:
            task: its task, as an index of the plan's tasks.
            start: its first element in the output tensor.
            note: what was recorded.
        """


class ChunkSet:
    """A set of chunks of a plan: one bit per chunk.

    Args:
        plan: the plan.
        chunk_elements: the most elements of a chunk.
    """

    def __init__(self, plan: Plan, chunk_elements: int) -> None:
        counts = (chunks_of(task, chunk_elements) for task in plan.tasks)
        self.first = list(accumulate(counts, initial=plan.first_chunk))
        """The number of each task's first chunk, and the number after the last chunk."""
        self._bits = bytearray((self.first[-1] - plan.first_chunk + 7) // 8)

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        at = number - self.first[0]
        return bool(self._bits[at >> 3] & 1 << (at & 7))

    def covers(self, number: int) -> bool:
        """Whether the plan has a chunk of this number."""
        return self.first[0] <= number < self.first[-1]

    def add(self, number: int) -> None:
        """Put a chunk into the set."""
        at = number - self.first[0]
        self._bits[at >> 3] |= 1 << (at & 7)

    def clear(self) -> None:
        """Take all chunks out of the set."""
        self._bits = bytearray(len(self._bits))


class Completed:
    """The completed chunks of a plan, as a set of numbers that takes one bit per chunk.

    Args:
        plan: the plan.
        chunk_elements: the most elements of a chunk.
        folder: the output folder, whose journal has the chunks of earlier runs and records new
            ones; None for a run that writes nothing and so cannot be resumed. Its journal may have
            chunks of another plan of the same job too, with other numbers.
        notes: what processes the output further, if something does.

    Attributes:
        chunks: their numbers.
        statistics: the results by tensor.
        resumed_bytes: bytes that earlier runs read and wrote, and this one does not.
        written: number of chunks that earlier runs completed, by shard.
        is_whole: whether earlier runs completed every chunk.
    """

    def __init__(
        self,
        plan: Plan,
        chunk_elements: int,
        folder: OutputFolder | None,
        notes: Notes | None = None,
    ) -> None:
        self._plan = plan
        self._chunk_elements = chunk_elements
        self._folder = folder
        self._notes = notes
        self._lock = threading.Lock()
        self.chunks = ChunkSet(plan, chunk_elements)
        self._replay()

    def __contains__(self, number: object) -> bool:
        return number in self.chunks

    def _replay(self) -> None:
        self.chunks.clear()
        self.statistics = Statistics(self._plan, self._chunk_elements)
        self.resumed_bytes = 0
        self.written = Counter[str]()
        missing = self.chunks.first[-1] - self.chunks.first[0]
        for done in self._folder.journal.done() if self._folder else ():
            if self.chunks.covers(done.number):
                self._take(done)
                missing -= 1
        self.is_whole = missing == 0

    def _take(self, done: Done) -> None:
        self.chunks.add(done.number)
        index = bisect_right(self.chunks.first, done.number) - 1
        task = self._plan.tasks[index]
        start = (done.number - self.chunks.first[index]) * step_of(task, self._chunk_elements)
        payload = done.payload
        if self._notes is not None:
            end = len(payload) - _NOTE_SIZE.size
            begin = end - _NOTE_SIZE.unpack_from(payload, end)[0]
            self._notes.recall(index, start, payload[begin:end])
            payload = payload[:begin]
        self.statistics.add(index, start, unpack(payload))
        self.resumed_bytes += done.moved
        if task.shard is not None:
            self.written[task.shard] += 1

    def forget(self) -> None:
        """Mark all chunks as not done, and those of plans with higher numbers."""
        if self._folder is not None:
            self._folder.journal.forget(self._plan.first_chunk)
        self._replay()

    def add(self, done: Sequence[tuple[Chunk, int, ChunkResult]]) -> None:
        """Record chunks that are done, including their writes if they have any.

        Args:
            done: each chunk with the bytes read and written, and its result.

        Raises:
            OutputError: if the journal cannot be written.
        """
        if self._folder is not None:
            taken = [
                Done(chunk.number, moved, pack(result) + self._note(chunk))
                for chunk, moved, result in done
            ]
            try:
                self._folder.journal.add(taken)
            except OSError as exc:
                raise write_error(self._folder.out, JOURNAL_NAME, exc) from exc
        with self._lock:
            for chunk, _, result in done:
                self.statistics.add(chunk.task, chunk.start, result)

    def _note(self, chunk: Chunk) -> bytes:
        """What the notes say of a chunk, with its size at the end, since the rest has none."""
        if self._notes is None:
            return b""
        note = self._notes.note(chunk)
        return note + _NOTE_SIZE.pack(len(note))
