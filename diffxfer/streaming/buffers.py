"""One thread's buffers, and the operations that only read inputs."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.exceptions import as_bits
from diffxfer.checkpoints.stored import BITS, FLOATS, Files, ShardFile
from diffxfer.errors import MatchError
from diffxfer.kernels.native import kernel
from diffxfer.kernels.signatures import SCRATCH, TOTALS
from diffxfer.streaming.checksum import block_digests
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Chunk, Operation, Piece, RunKind, TensorTask
from diffxfer.streaming.statistics import ChunkResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from diffxfer.checkpoints.files import OpenShard
    from diffxfer.checkpoints.shared import Shared

_MAX_INPUTS = 4


class Reader:
    """The buffers of one thread, and the operations that write nothing.

    Args:
        chunk_elements: the most elements of a chunk.
        allow_nonfinite: let NaN, infinity and overflow through.
        open_shard: opens an input file.
        shared: what the threads of the run find out together.
    """

    def __init__(
        self,
        chunk_elements: int,
        *,
        allow_nonfinite: bool,
        open_shard: Callable[[ShardFile], OpenShard],
        shared: Shared | None = None,
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._files = Files(open_shard, shared)
        self.shared = self._files.shared
        # Bytes for the widest dtype; pages that a run does not use take no memory.
        self._views = [
            memoryview(mmap.mmap(-1, chunk_elements * 8)) for _ in range(_MAX_INPUTS + 2)
        ]
        self._addresses = [np.frombuffer(view, np.uint8).ctypes.data for view in self._views]
        self._result, self._whole = _MAX_INPUTS, _MAX_INPUTS + 1
        self._totals = np.zeros(TOTALS)
        self._scratch = np.zeros(SCRATCH)
        self._sums = self._scratch.ctypes.data, self._totals.ctypes.data

    def examine(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Process a chunk of a task that writes nothing.

        Args:
            chunk: the chunk.
            task: its task.

        Raises:
            MatchError: if tensors that must be equal are not.
            CheckpointError: if an input cannot be read, or has changed.
        """
        if task.operation is Operation.CONTRAST:
            return self._contrast(chunk, task)
        if task.operation is Operation.DISTANCES:
            return self._distances(chunk, task)
        if task.operation in (Operation.RESTORE, Operation.APPROACH):
            return self._restore(chunk, task)
        return self._inspect(chunk, task)

    def _contrast(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Measure how two inputs differ."""
        (piece,) = chunk.pieces
        for slot in (0, 1):
            self._read(slot, task, piece, 0)
        if task.dtype not in FLOATS:
            return ChunkResult(unchanged=self._equal(chunk.count))
        sizes = [BITS[spec.dtype] // 8 for spec in task.inputs]
        compare = kernel("contrast", (task.inputs[0].dtype, task.inputs[1].dtype))
        result = ChunkResult()
        for start in range(0, chunk.count, BLOCK_ELEMENTS):
            count = min(BLOCK_ELEMENTS, chunk.count - start)
            at = [self._addresses[slot] + start * sizes[slot] for slot in (0, 1)]
            result.unchanged += compare(*at, count, *self._sums)
            delta, left, right = self._totals[:3].tolist()
            result.delta_squares += (delta,)
            result.base_squares += (left,)
            result.other_squares += (right,)
        return result

    def _distances(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Measure how far three or four inputs are from each other, in rows that all have."""
        count, slots = 0, range(len(task.inputs))
        dtypes = [spec.dtype for spec in task.inputs]
        # What an adapter does not change is base's own tensor, which is read once.
        same = task.inputs[0] is task.inputs[1]
        for piece in chunk.pieces:
            if piece.kind is RunKind.GRAFT:
                same = same and piece.sources[0] == piece.sources[1]
        at = [self._addresses[1 if same and slot == 0 else slot] for slot in slots]
        for piece in chunk.pieces:
            if piece.kind is RunKind.GRAFT:
                for slot in slots[1 if same else 0 :]:
                    self._read(slot, task, piece, count)
                count += piece.count
        result = ChunkResult()
        for start in range(0, count, BLOCK_ELEMENTS):
            size = min(BLOCK_ELEMENTS, count - start)
            here = [at[slot] + start * BITS[dtypes[slot]] // 8 for slot in slots]
            kernel("distances", tuple(dtypes[:3]))(*here[:3], size, *self._sums)
            sums = self._totals[:10].tolist()
            if len(here) == 4:
                kernel("gains", tuple(dtypes))(*here, size, *self._sums)
                sums += self._totals[:7].tolist()
            result.sums += (tuple(sums),)
        return result

    def _inspect(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Compare or digest inputs."""
        (piece,) = chunk.pieces
        read = [self._read(slot, task, piece, 0) for slot in range(len(task.inputs))]
        if task.operation is Operation.DIGEST:
            return ChunkResult(block_digests(read[0], BITS[task.inputs[0].dtype] // 8))
        if self._equal(len(read[0])) != len(read[0]):
            raise MatchError(
                (),
                f"{task.name} has different {task.inputs[0].dtype} values in finetuned and base,"
                " but a diff vector has no integer tensors",
                "give --exclude with its name: the graft then keeps the target's tensor",
                where=task.inputs[0].shard.path,
            )
        return ChunkResult()

    def _equal(self, size: int) -> int:
        """The number of leading bytes that are equal in two inputs."""
        return kernel("equal", ("U8", "U8"))(*self._addresses[:2], size)

    def _restore(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Count the elements of finetuned that base + Δ does not give back.

        Δ has finetuned's order, so it is read and digested from end to end. Rows that belong to no
        token of base are not compared.
        """
        result = ChunkResult()
        ours, theirs, stored = (spec.dtype for spec in task.inputs)
        whole = Piece(RunKind.GRAFT, 0, chunk.count, (-1, -1, chunk.start))
        result.digests = block_digests(self._read(2, task, whole, 0), BITS[stored] // 8)
        for piece in chunk.pieces:
            if piece.kind is RunKind.ZERO:
                continue
            self._read(0, task, piece, 0)
            delta = self._addresses[2] + piece.at * BITS[stored] // 8
            if piece.kind is RunKind.GRAFT:
                read = self._read(1, task, piece, 0)
                if len(task.runs) == 1:
                    result.input_digests = block_digests(read, BITS[theirs] // 8)
                count = kernel("restore", (ours, theirs, stored))
                inexact = count(*self._addresses[:2], delta, piece.count)
                if task.operation is Operation.APPROACH:
                    result.sums += self._stray(task, delta, piece.count)
            else:
                count = kernel("give_back", (ours, stored))
                inexact = count(self._addresses[0], delta, piece.count)
            result.inexact += self._not_restored(inexact, chunk, piece, task)
        return result

    def _not_restored(self, inexact: int, chunk: Chunk, piece: Piece, task: TensorTask) -> int:
        """The number of elements of a piece that base, Δ and its exceptions do not give back."""
        ours, theirs = (stored.dtype for stored in task.inputs[:2])
        finetuned = as_bits(self._views[0][: piece.count * BITS[ours] // 8], ours)
        begin = chunk.start + piece.at
        for at, found in task.inputs[2].exceptions(self._files, begin, piece.count):
            if found.dtype != ours:
                continue
            if piece.kind is not RunKind.GRAFT:  # −0.0 + Δ is Δ
                zeros = self._views[1][: piece.count * BITS[theirs] // 8]
                as_bits(zeros, theirs)[:] = 1 << (BITS[theirs] - 1)
            places = found.places + at
            were_lost = np.isin(places, self._lost(0, piece.count, task, 2, piece.at))
            are_right = finetuned[places] == found.bits
            inexact += int(np.count_nonzero(~are_right)) - int(np.count_nonzero(were_lost))
        return inexact

    def _lost(
        self, at: int, count: int, task: TensorTask, slot: int, inside: int | None = None
    ) -> NDArray[np.int64]:
        """Which of some elements base + Δ does not give back.

        Args:
            at: their offset in the buffers.
            count: their number.
            task: their task, whose first inputs are finetuned and base.
            slot: the buffer of Δ.
            inside: their offset in this buffer, if it is another one.
        """
        dtypes = (task.inputs[0].dtype, task.inputs[1].dtype, task.dtype)
        offsets = at, at, at if inside is None else inside
        addresses = [
            self._addresses[buffer] + offset * BITS[dtype] // 8
            for buffer, offset, dtype in zip((0, 1, slot), offsets, dtypes, strict=True)
        ]
        marks = np.empty(count, np.uint8)
        kernel("lost", (*dtypes, "U8"))(*addresses, marks.ctypes.data, count)
        return np.flatnonzero(marks)

    def _stray(self, task: TensorTask, delta: int, count: int) -> tuple[tuple[float, ...], ...]:
        """The squares of Δ − (finetuned − base) and of finetuned − base, for each block."""
        ours, theirs, stored = dtypes = tuple(spec.dtype for spec in task.inputs)
        steps = BITS[ours] // 8, BITS[theirs] // 8, BITS[stored] // 8
        places, found = (*self._addresses[:2], delta), []
        for start in range(0, count, BLOCK_ELEMENTS):
            here = [at + start * step for at, step in zip(places, steps, strict=True)]
            kernel("stray", dtypes)(*here, min(BLOCK_ELEMENTS, count - start), *self._sums)
            found.append(tuple(self._totals[:2].tolist()))
        return tuple(found)

    def _read(self, slot: int, task: TensorTask, piece: Piece, at: int) -> memoryview:
        """Read a piece of an input into its buffer, at the element offset `at`."""
        stored = task.inputs[slot]
        size = BITS[stored.dtype] // 8
        view = self._views[slot][at * size : (at + piece.count) * size]
        stored.read(self._files, piece.sources[slot], view)
        return view
