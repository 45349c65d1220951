"""One thread's work in a run: read a chunk, compute it, check it.

A worker owns its buffers and reuses them for every chunk, so a run's memory depends only on the
chunk size and the number of threads.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.exceptions import Exceptions, as_bits
from diffxfer.checkpoints.stored import BITS, FLOATS
from diffxfer.checkpoints.values import elements, in_float64
from diffxfer.kernels.native import kernel
from diffxfer.streaming.batch import read_grafted
from diffxfer.streaming.buffers import Reader
from diffxfer.streaming.checksum import block_digests
from diffxfer.streaming.finite import not_finite
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Chunk, Operation, Piece, RunKind, TensorTask
from diffxfer.streaming.statistics import ChunkResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


class Worker(Reader):
    """The computation of chunks by one thread, with its own buffers."""

    def process(self, chunk: Chunk, task: TensorTask) -> tuple[memoryview, ChunkResult]:
        """Compute a chunk.

        Args:
            chunk: the chunk.
            task: its task.

        Returns:
            The bytes to write, valid until the next call, and the chunk's result.

        Raises:
            NonFiniteError: at NaN, infinity or overflow, unless they are allowed.
            MatchError: if tensors that must be equal are not.
            CheckpointError: if an input cannot be read, or has changed.
        """
        if task.shard is None:
            return memoryview(b""), self.examine(chunk, task)
        result = ChunkResult()
        if len(chunk.pieces) == 1:
            data = self._single(chunk, task, result)
        else:
            data = self._assemble(chunk, task, result)
        if task.operation is Operation.GIVE_BACK:
            self._give_back(data, chunk, task)
        result.digests = block_digests(data, task.itemsize)
        return data, result

    def _single(self, chunk: Chunk, task: TensorTask, result: ChunkResult) -> memoryview:
        (piece,) = chunk.pieces
        if piece.kind is RunKind.GRAFT:
            return self._graft([piece], chunk, task, result)
        return self._plain(piece, chunk, task, result)

    def _assemble(self, chunk: Chunk, task: TensorTask, result: ChunkResult) -> memoryview:
        """Make a chunk of several pieces: compute the grafted ones together, then place them."""
        grafts = [piece for piece in chunk.pieces if piece.kind is RunKind.GRAFT]
        computed = self._graft(grafts, chunk, task, result) if grafts else memoryview(b"")
        return self.place(computed, chunk, task, result)

    def place(
        self, computed: memoryview, chunk: Chunk, task: TensorTask, result: ChunkResult
    ) -> memoryview:
        """Assemble a chunk from its computed pieces and its other pieces.

        Args:
            computed: the bytes of its grafted pieces, in order.
            chunk: the chunk.
            task: its task.
            result: its result so far.

        Returns:
            The chunk's bytes, valid until the next call.

        Raises:
            NonFiniteError: at NaN, infinity or overflow in another piece, unless they are allowed.
            CheckpointError: if an input cannot be read, or has changed.
        """
        size = task.itemsize
        whole = self._views[self._whole][: chunk.count * size]
        done = 0
        for piece in chunk.pieces:
            if piece.kind is RunKind.GRAFT:
                part = computed[done : done + piece.count * size]
                whole[piece.at * size : (piece.at + piece.count) * size] = part
                done += len(part)
        for piece in chunk.pieces:
            if piece.kind is not RunKind.GRAFT:
                part = self._plain(piece, chunk, task, result)
                whole[piece.at * size : (piece.at + piece.count) * size] = part
        return whole

    def process_many(
        self, batch: Sequence[Chunk], tasks: Sequence[TensorTask]
    ) -> tuple[memoryview, list[ChunkResult]] | None:
        """Compute a batch of whole small tensors at once, as `batches` groups them.

        Args:
            batch: the chunks.
            tasks: the task of each.

        Returns:
            The bytes to write, tensor after tensor, valid until the next call, and the results;
            None if one is not finite, so that the caller finds it by processing them one by one.

        Raises:
            CheckpointError: if an input cannot be read, or has changed.
        """
        first, counts = tasks[0], [chunk.count for chunk in batch]
        self._read_side_by_side(batch, tasks)
        results = [ChunkResult() for _ in batch]
        starts = list(accumulate(counts, initial=0))
        if first.operation in (Operation.SUBTRACT, Operation.EXACT):
            found = 0
            for at, chunk, task, result in zip(starts, batch, tasks, results, strict=False):
                found |= self._subtract(at, chunk.count, task, result)
                result.samples = self._sample(at, chunk.pieces, chunk, task)
                self._keep_lost(at, chunk.pieces, task, result)
        else:
            found = self._compute(first, starts[-1])
            for at, chunk, task, result in zip(starts, batch, tasks, results, strict=False):
                self._digest_first(at, chunk.count, task, result)
        if found and not self._allow_nonfinite:
            return None
        data = self._views[self._result][: starts[-1] * first.itemsize]
        size = first.itemsize
        for at, chunk, result in zip(starts, batch, results, strict=False):
            result.digests = block_digests(data[at * size : (at + chunk.count) * size], size)
        return data, results

    def _read_side_by_side(self, batch: Sequence[Chunk], tasks: Sequence[TensorTask]) -> None:
        """Read whole tensors into the buffers, in order; tensors adjacent on disk in one read."""
        for slot in range(len(tasks[0].inputs)):
            read_grafted(self._files, batch, tasks, slot, self._views[slot])

    def _graft(
        self, pieces: list[Piece], chunk: Chunk, task: TensorTask, result: ChunkResult
    ) -> memoryview:
        """Compute pieces that are read into the buffers one after the other."""
        count = 0
        for piece in pieces:
            for slot in range(len(task.inputs)):
                self._read(slot, task, piece, count)
            count += piece.count
        if task.operation in (Operation.SUBTRACT, Operation.EXACT, Operation.STORE):
            found = self._subtract(0, count, task, result)
            result.samples = self._sample(0, pieces, chunk, task)
            self._keep_lost(0, pieces, task, result)
        else:
            found = self._compute(task, count)
            self._digest_first(0, count, task, result)
        out = self._views[self._result][: count * task.itemsize]
        if found and not self._allow_nonfinite:
            inputs = [(slot, self._input(slot, task, 0, count)) for slot in range(len(task.inputs))]
            raise not_finite(out, inputs, pieces, chunk, task)
        return out

    def _compute(self, task: TensorTask, count: int) -> int:
        """Compute the first elements in the buffers; returns non-zero if a result is not finite."""
        name = "transfer" if task.operation is Operation.TRANSFER else "apply"
        inputs = self._addresses[: len(task.inputs)]
        compute = kernel(name, (*[spec.dtype for spec in task.inputs], task.dtype))
        return compute(*inputs, self._addresses[self._result], count, task.alpha)

    def _digest_first(self, at: int, count: int, task: TensorTask, result: ChunkResult) -> None:
        """Digest the first input, if its checksum is known and it is read in order."""
        if task.expected is not None and len(task.runs) == 1:
            size = BITS[task.inputs[0].dtype] // 8
            result.input_digests = block_digests(self._input(0, task, at, count), size)

    def _subtract(self, at: int, count: int, task: TensorTask, result: ChunkResult) -> int:
        """Compute Δ of elements at an offset in the buffers, and add to the result."""
        dtypes = task.inputs[0].dtype, task.inputs[1].dtype, task.dtype
        name = "store" if task.operation is Operation.STORE else "subtract"
        compute, found = kernel(name, dtypes), 0
        ours, theirs, out = (BITS[dtype] // 8 for dtype in dtypes)
        slots = self._addresses[0], self._addresses[1], self._addresses[self._result]
        for start in range(at, at + count, BLOCK_ELEMENTS):
            here = slots[0] + start * ours, slots[1] + start * theirs, slots[2] + start * out
            size = min(BLOCK_ELEMENTS, at + count - start)
            found |= compute(*here, size, *self._sums)
            delta, base, unchanged, inexact = self._totals[:4].tolist()
            result.delta_squares += (delta,)
            result.base_squares += (base,)
            result.unchanged += int(unchanged)
            result.inexact += int(inexact)
        if len(task.runs) == 1:
            result.input_digests = block_digests(self._input(1, task, at, count), theirs)
        return found

    def _keep_lost(
        self, at: int, pieces: Sequence[Piece], task: TensorTask, result: ChunkResult
    ) -> None:
        """Keep finetuned's bits of the inexact elements of an exact difference."""
        if task.operation is not Operation.EXACT or not result.inexact:
            return
        count = sum(piece.count for piece in pieces)
        found = self._lost(at, count, task, self._result)
        bits = as_bits(self._input(0, task, at, count), task.inputs[0].dtype)[found]
        places = _in_chunk(found, pieces)
        result.exceptions += (Exceptions(task.inputs[0].dtype, places, bits),)
        result.inexact = 0

    def _give_back(self, data: memoryview, chunk: Chunk, task: TensorTask) -> None:
        """Replace the elements of base + Δ that are not finetuned's."""
        for piece in chunk.pieces:
            if piece.kind not in (RunKind.GRAFT, RunKind.ADD):
                continue
            begin = piece.sources[0]
            for at, found in task.inputs[0].exceptions(self._files, begin, piece.count):
                if found.dtype == task.dtype:
                    found.put_into(data[(piece.at + at) * task.itemsize :])

    def _input(self, slot: int, task: TensorTask, at: int, count: int) -> memoryview:
        """Elements of an input at an offset in its buffer."""
        size = BITS[task.inputs[slot].dtype] // 8
        return self._views[slot][at * size : (at + count) * size]

    def _sample(
        self, at: int, pieces: Sequence[Piece], chunk: Chunk, task: TensorTask
    ) -> tuple[tuple[int, float], ...]:
        if not task.sample:
            return ()
        count = sum(piece.count for piece in pieces)
        return sample(self._input(1, task, at, count), pieces, chunk, task)

    def _plain(
        self, piece: Piece, chunk: Chunk, task: TensorTask, result: ChunkResult
    ) -> memoryview:
        """Make a piece without arithmetic: copied, added or zero."""
        view = self._views[self._result][: piece.count * task.itemsize]
        if piece.kind is RunKind.ZERO:
            view[:] = bytes(len(view))
            return view
        source = 0 if piece.kind is RunKind.ADD else len(task.inputs) - 1
        dtype = task.inputs[source].dtype
        read = out = self._read(source, task, piece, 0)
        if dtype not in FLOATS or task.operation is Operation.KEEP:
            return read
        at, made = self._addresses[source], self._addresses[self._result]
        if dtype != task.dtype:
            out = view
            found = kernel("convert", (dtype, task.dtype))(at, made, piece.count)
        elif not self._allow_nonfinite:
            found = kernel("check", (dtype,))(at, piece.count)
        else:
            found = 0
        if found and not self._allow_nonfinite:
            raise not_finite(out, [(source, read)], [piece], chunk, task)
        if task.operation is Operation.SUBTRACT and dtype != task.dtype:
            result.inexact += kernel("give_back", (dtype, task.dtype))(at, made, piece.count)
        elif task.operation is Operation.EXACT:
            result.exceptions += tuple(_not_numbers(read, dtype, piece))
        return out


def _in_chunk(found: NDArray[np.int64], pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """Places among pieces that follow each other, as places in their chunk."""
    ends = np.cumsum([piece.count for piece in pieces])
    shifts = np.array([piece.at + piece.count for piece in pieces]) - ends
    moved: NDArray[np.int64] = found + shifts[np.searchsorted(ends, found, side="right")]
    return moved


def _not_numbers(read: memoryview, dtype: str, piece: Piece) -> Iterator[Exceptions]:
    """The NaN of a piece, whose bits no conversion keeps."""
    (found,) = np.isnan(in_float64(elements(read, dtype), dtype)).nonzero()
    if len(found):
        yield Exceptions(dtype, found + piece.at, as_bits(read, dtype)[found])


def sample(
    base: memoryview, pieces: Sequence[Piece], chunk: Chunk, task: TensorTask
) -> tuple[tuple[int, float], ...]:
    """The sampled elements of base that are in some pieces.

    Args:
        base: the bytes of base's elements, piece after piece.
        pieces: the pieces of the chunk.
        chunk: the chunk.
        task: its task.
    """
    dtype = task.inputs[1].dtype
    stored = elements(base, dtype)
    found: list[tuple[int, float]] = []
    done = 0
    for piece in pieces:
        first = chunk.start + piece.at
        low = bisect_left(task.sample, first)
        high = bisect_left(task.sample, first + piece.count)
        wanted = task.sample[low:high]
        if wanted:
            places = [done + index - first for index in wanted]
            values = in_float64(stored[places], dtype).tolist()
            found.extend(zip(wanted, values, strict=True))
        done += piece.count
    return tuple(found)
