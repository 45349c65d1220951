"""One thread's share of a run: read a chunk, compute it, check it, write it.

A worker owns its buffers and uses them again for every chunk, so that what a run takes in memory
depends on the size of a chunk and the number of threads, and on nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.header import BITS, FLOATS
from diffxfer.streaming import narrow, ops
from diffxfer.streaming.batch import spans
from diffxfer.streaming.checksum import block_digests
from diffxfer.streaming.finite import check_finite
from diffxfer.streaming.look import Looker
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Chunk, Operation, Piece, RunKind, TensorTask
from diffxfer.streaming.tally import ChunkResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_NOTHING = np.empty(0, np.bool_)


class Worker(Looker):
    """What one thread does, with the buffers that it has for it."""

    def process(self, chunk: Chunk, task: TensorTask) -> tuple[memoryview, ChunkResult]:
        """Compute a chunk.

        Args:
            chunk: which elements.
            task: what it is a part of.

        Returns:
            The bytes to write, valid until the next call, and what is known of them.

        Raises:
            NonFiniteError: at NaN, infinity or overflow, unless they are allowed.
            MatchError: if tensors that must be the same are not.
            CheckpointError: if an input cannot be read as it was.
        """
        if task.shard is None:
            return memoryview(b""), self.look(chunk, task)
        result = ChunkResult()
        if len(chunk.pieces) == 1:
            data = self._single(chunk, task, result)
        else:
            data = self._assemble(chunk, task, result)
        result.digests = block_digests(data, task.itemsize)
        return data, result

    def _single(self, chunk: Chunk, task: TensorTask, result: ChunkResult) -> memoryview:
        (piece,) = chunk.pieces
        if piece.kind is RunKind.GRAFT:
            return self._graft([piece], chunk, task, result)
        return self._plain(piece, chunk, task, result)

    def _assemble(self, chunk: Chunk, task: TensorTask, result: ChunkResult) -> memoryview:
        """A chunk whose rows are treated differently: compute the grafts together, then place."""
        grafts = [piece for piece in chunk.pieces if piece.kind is RunKind.GRAFT]
        computed = self._graft(grafts, chunk, task, result) if grafts else memoryview(b"")
        return self.place(computed, chunk, task, result)

    def place(
        self, computed: memoryview, chunk: Chunk, task: TensorTask, result: ChunkResult
    ) -> memoryview:
        """Put what was computed where it belongs in a chunk, and the other pieces beside it.

        Args:
            computed: the bytes of its grafted pieces, one after the other.
            chunk: which elements.
            task: what it is a part of.
            result: what is known of it so far.

        Returns:
            The chunk's bytes, valid until the next call.

        Raises:
            NonFiniteError: at NaN, infinity or overflow in another piece, unless they are allowed.
            CheckpointError: if an input cannot be read as it was.
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
        """Compute whole small tensors at once, as `batches` puts them together.

        Args:
            batch: the chunks.
            tasks: what each is the whole of.

        Returns:
            The bytes to write, one tensor's after the other's, valid until the next call, and what
            is known of each; None where one is not finite: one by one, it is found which.

        Raises:
            CheckpointError: if an input cannot be read as it was.
        """
        first, counts = tasks[0], [chunk.count for chunk in batch]
        self._read_side_by_side(batch, tasks)
        out, inputs = self._compute_read(first, sum(counts))
        if inputs and not self._allow_nonfinite and not ops.all_finite(out):
            return None
        results = [ChunkResult() for _ in batch]
        subtracts = first.operation is Operation.SUBTRACT
        changed = self._changed(first, len(out)) if subtracts else _NOTHING
        data = self._views[self._result][: len(out) * first.itemsize]
        for at, chunk, task, result in zip(
            accumulate(counts[:-1], initial=0), batch, tasks, results, strict=True
        ):
            part = data[at * task.itemsize : (at + chunk.count) * task.itemsize]
            result.digests = block_digests(part, task.itemsize)
            if subtracts:
                self._measure(at, chunk.count, list(chunk.pieces), chunk, task, result, changed)
        if subtracts:
            different = self._not_given_back(out, first)
            for at, result, count in zip(
                accumulate(counts[:-1], initial=0), results, counts, strict=True
            ):
                result.inexact = int(np.count_nonzero(different[at : at + count]))
        return data, results

    def _read_side_by_side(self, batch: Sequence[Chunk], tasks: Sequence[TensorTask]) -> None:
        """Read whole tensors into the buffers, one after the other; neighbours on disk at once."""
        for slot in range(len(tasks[0].inputs)):
            view, filled = self._views[slot], 0
            for spec, begin, end in spans(batch, tasks, slot):
                self._open_shard(spec).read_into(view[filled : filled + end - begin], begin)
                filled += end - begin

    def _graft(
        self, pieces: list[Piece], chunk: Chunk, task: TensorTask, result: ChunkResult
    ) -> memoryview:
        """Arithmetic on pieces that lie one after the other in the buffers."""
        count = 0
        for piece in pieces:
            for slot in range(len(task.inputs)):
                self._read(slot, task, piece, count)
            count += piece.count
        out, inputs = self._compute_read(task, count)
        if inputs and not self._allow_nonfinite:
            check_finite(out, list(enumerate(inputs)), pieces, chunk, task)
        if task.operation is Operation.SUBTRACT:
            self._measure(0, count, pieces, chunk, task, result, self._changed(task, count))
            result.inexact += int(np.count_nonzero(self._not_given_back(out, task)))
        return self._views[self._result][: count * task.itemsize]

    def _compute_read(self, task: TensorTask, count: int) -> tuple[Tensor, list[Tensor]]:
        """Compute what was read; the inputs come back unless the result is known to be finite."""
        inputs = [self._values(slot, spec.dtype, count) for slot, spec in enumerate(task.inputs)]
        out = self._values(self._result, task.dtype, count)
        if self._compute_narrow(inputs, task, out):
            return out, []
        # `_measure` finds Δ and base in their buffers.
        delta, total = self._delta[:count], self._total[:count]
        ops.compute(task.operation, inputs, task.alpha, delta, total, out)
        return out, inputs

    def _compute_narrow(self, inputs: list[Tensor], task: TensorTask, out: Tensor) -> bool:
        """As `ops.compute`, where that takes fewer passes and is finite; otherwise False."""
        if task.alpha != 1.0:
            return False
        if task.operation is Operation.APPLY:
            return narrow.add(inputs[0], inputs[1], out)
        if task.operation is not Operation.TRANSFER:
            return False
        buffers = self._delta[: len(out)], self._total[: len(out)]
        return narrow.transfer(inputs[0], inputs[1], inputs[2], out, *buffers)

    def _plain(
        self, piece: Piece, chunk: Chunk, task: TensorTask, result: ChunkResult
    ) -> memoryview:
        """A piece that takes no arithmetic: copied, added or zero."""
        view = self._views[self._result][: piece.count * task.itemsize]
        if piece.kind is RunKind.ZERO:
            view[:] = bytes(len(view))
            return view
        source = 0 if piece.kind is RunKind.ADD else len(task.inputs) - 1
        spec = task.inputs[source]
        read = self._read(source, task, piece, 0)
        if spec.dtype not in FLOATS or task.operation is Operation.KEEP:
            return read
        values = out = self._values(source, spec.dtype, piece.count)
        if spec.dtype != task.dtype:
            out = self._values(self._result, task.dtype, piece.count)
            out.copy_(values)
        if not self._allow_nonfinite:
            check_finite(out, [(source, values)], [piece], chunk, task)
        if out is values:
            return read
        if task.operation is Operation.SUBTRACT:
            back = out.to(values.dtype)
            result.inexact += int(np.count_nonzero(ops.different_bits(back, values)))
        return view

    def _measure(
        self,
        at: int,
        count: int,
        pieces: list[Piece],
        chunk: Chunk,
        task: TensorTask,
        result: ChunkResult,
        changed: NDArray[np.bool_],
    ) -> None:
        """Norms, samples and base's digests, of elements that lie at some place in the buffers."""
        delta, base64 = self._delta[at : at + count], self._total[at : at + count]
        blocks = [slice(start, start + BLOCK_ELEMENTS) for start in range(0, count, BLOCK_ELEMENTS)]
        result.delta_squares = tuple([ops.squared_norm(delta[block]) for block in blocks])
        result.base_squares = tuple([ops.squared_norm(base64[block]) for block in blocks])
        result.samples = sample(base64, pieces, chunk, task)
        result.unchanged = count - int(np.count_nonzero(changed[at : at + count]))
        if len(task.runs) == 1:
            size = BITS[task.inputs[1].dtype] // 8
            read = self._views[1][at * size : (at + count) * size]
            result.base_digests = block_digests(read, size)

    def _pair(self, task: TensorTask, count: int) -> tuple[Tensor, Tensor]:
        """Finetuned and base, as they were read."""
        ours, theirs = (self._values(slot, task.inputs[slot].dtype, count) for slot in (0, 1))
        return ours, theirs

    def _changed(self, task: TensorTask, count: int) -> NDArray[np.bool_]:
        """Which elements fine-tuning changed; of many tensors at once, as each call takes time."""
        return ops.different(*self._pair(task, count), self._delta[:count])

    def _not_given_back(self, out: Tensor, task: TensorTask) -> NDArray[np.bool_]:
        """Which elements of finetuned base + Δ does not give back; overwrites Δ in float64."""
        count = len(out)
        ours, theirs = self._pair(task, count)
        back = self._values(self._whole, task.inputs[0].dtype, count)
        if not narrow.add(theirs, out, back, finite=not self._allow_nonfinite):
            delta = self._delta[:count]
            delta.copy_(out)
            delta.add_(self._total[:count])
            back.copy_(delta)
        return ops.different_bits(back, ours)


def sample(
    base: Tensor, pieces: Sequence[Piece], chunk: Chunk, task: TensorTask
) -> tuple[tuple[int, float], ...]:
    """The elements of base that a task asks for, where they lie in some pieces.

    Args:
        base: its elements, one piece's after the other's, on the CPU.
        pieces: of the chunk.
        chunk: which elements.
        task: what it is a part of.
    """
    found: list[tuple[int, float]] = []
    done = 0
    for piece in pieces:
        first = chunk.start + piece.at
        low = bisect_left(task.sample, first)
        high = bisect_left(task.sample, first + piece.count)
        wanted = task.sample[low:high]
        if wanted:
            places = [done + index - first for index in wanted]
            found.extend(zip(wanted, base[places].double().tolist(), strict=True))
        done += piece.count
    return tuple(found)
