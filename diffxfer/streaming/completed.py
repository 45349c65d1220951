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
from typing import TYPE_CHECKING

from diffxfer.checkpoints.journal import JOURNAL_NAME, Done
from diffxfer.checkpoints.writer import write_error
from diffxfer.streaming.plan import chunks_of, step_of
from diffxfer.streaming.statistics import ChunkResult, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.plan import Chunk, Plan

_COUNTS, _BLOCKS = struct.Struct("<2Q4I"), struct.Struct("<I")


def pack(result: ChunkResult) -> bytes:
    """Pack a chunk's result into bytes; floats keep every bit.

    Args:
        result: the result.
    """
    digests, squares = result.digests, result.delta_squares + result.base_squares
    counts = len(digests), len(result.input_digests), len(result.delta_squares), len(result.samples)
    head = _COUNTS.pack(result.inexact, result.unchanged, *counts)
    head += digests + result.input_digests
    if squares or result.samples:
        flat = [value for sample in result.samples for value in sample]
        layout = f"<{len(squares)}d" + "Qd" * len(result.samples)
        head += struct.pack(layout, *squares, *flat)
    if not result.sums:
        return head
    sums = [value for block in result.sums for value in block]
    return head + _BLOCKS.pack(len(result.sums)) + struct.pack(f"<{len(sums)}d", *sums)


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
    rest = payload[at + input_digests + struct.calcsize(layout) :]
    return ChunkResult(
        payload[_COUNTS.size : at],
        payload[at : at + input_digests],
        inexact,
        unchanged,
        found[:blocks],
        found[blocks : 2 * blocks],
        tuple(zip(flat[::2], flat[1::2], strict=True)),
        sums=_sums(rest) if rest else (),
    )


def _sums(payload: bytes) -> tuple[tuple[float, ...], ...]:
    (blocks,) = _BLOCKS.unpack_from(payload)
    values = struct.unpack_from(f"<{(len(payload) - _BLOCKS.size) // 8}d", payload, _BLOCKS.size)
    width = len(values) // blocks
    return tuple([values[at : at + width] for at in range(0, len(values), width)])


class Completed:
    """The completed chunks of a plan, as a set of numbers that takes one bit per chunk.

    Args:
        plan: the plan.
        chunk_elements: the most elements of a chunk.
        folder: the output folder, whose journal has the chunks of earlier runs and records new
            ones; None for a run that writes nothing and so cannot be resumed.

    Attributes:
        statistics: the results by tensor.
        resumed_bytes: bytes that earlier runs read and wrote, and this one does not.
        written: number of chunks that earlier runs completed, by shard.
    """

    def __init__(self, plan: Plan, chunk_elements: int, folder: OutputFolder | None) -> None:
        self._plan = plan
        self._chunk_elements = chunk_elements
        self._folder = folder
        counts = (chunks_of(task, chunk_elements) for task in plan.tasks)
        self._lock = threading.Lock()
        self._first = list(accumulate(counts, initial=0))
        self._replay()

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and bool(self._bits[number >> 3] & 1 << (number & 7))

    def _replay(self) -> None:
        self._bits = bytearray((self._first[-1] + 7) // 8)
        self.statistics = Statistics(self._plan, self._chunk_elements)
        self.resumed_bytes = 0
        self.written = Counter[str]()
        for number, moved, payload in self._folder.journal.done() if self._folder else ():
            self._bits[number >> 3] |= 1 << (number & 7)
            index = bisect_right(self._first, number) - 1
            task = self._plan.tasks[index]
            step = step_of(task, self._chunk_elements)
            self.statistics.add(index, (number - self._first[index]) * step, unpack(payload))
            self.resumed_bytes += moved
            if task.shard is not None:
                self.written[task.shard] += 1

    def forget(self) -> None:
        """Mark all chunks as not done."""
        if self._folder is not None:
            self._folder.journal.forget()
        self._replay()

    def add(self, done: Sequence[tuple[Chunk, int, ChunkResult]]) -> None:
        """Record chunks that are done, including their writes if they have any.

        Args:
            done: each chunk with the bytes read and written, and its result.

        Raises:
            OutputError: if the journal cannot be written.
        """
        if self._folder is not None:
            taken = [Done(chunk.number, moved, pack(result)) for chunk, moved, result in done]
            try:
                self._folder.journal.add(taken)
            except OSError as exc:
                raise write_error(self._folder.out, JOURNAL_NAME, exc) from exc
        with self._lock:
            for chunk, _, result in done:
                self.statistics.add(chunk.task, chunk.start, result)
