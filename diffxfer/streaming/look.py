"""One thread's buffers, and the operations that only look at inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffxfer.checkpoints.header import BITS, FLOATS, TensorSpec
from diffxfer.errors import MatchError
from diffxfer.streaming import ops
from diffxfer.streaming.checksum import block_digests
from diffxfer.streaming.contrast import contrast, contrast_bytes
from diffxfer.streaming.plan import Chunk, Operation, Piece, RunKind, TensorTask
from diffxfer.streaming.tally import ChunkResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.checkpoints.reader import OpenShard

_MAX_INPUTS = 3


class Looker:
    """The buffers of one thread, and what it learns from inputs with nothing to write.

    Args:
        chunk_elements: the most elements of a chunk.
        allow_nonfinite: let NaN, infinity and overflow through.
        open_shard: gives an input file, open.
    """

    def __init__(
        self,
        chunk_elements: int,
        *,
        allow_nonfinite: bool,
        open_shard: Callable[[TensorSpec], OpenShard],
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._open_shard = open_shard
        # Bytes for the widest dtype; pages that a run does not touch are never resident.
        self._bytes = [
            torch.empty(chunk_elements * 8, dtype=torch.uint8) for _ in range(_MAX_INPUTS + 2)
        ]
        self._views = [buffer.numpy().data for buffer in self._bytes]
        self._delta = torch.empty(chunk_elements, dtype=torch.float64)
        self._total = torch.empty(chunk_elements, dtype=torch.float64)
        self._result, self._whole = _MAX_INPUTS, _MAX_INPUTS + 1

    def look(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Learn what a task is for that writes nothing.

        Args:
            chunk: which elements.
            task: what it is a part of.

        Raises:
            MatchError: if tensors that must be the same are not.
            CheckpointError: if an input cannot be read as it was.
        """
        if task.operation is Operation.CONTRAST:
            return self._contrast(chunk, task)
        result = ChunkResult()
        if task.operation is Operation.RESTORE:
            self._restore(chunk, task, result)
        else:
            self._inspect(chunk, task, result)
        return result

    def _contrast(self, chunk: Chunk, task: TensorTask) -> ChunkResult:
        """Measure how two inputs differ; nothing is written."""
        (piece,) = chunk.pieces
        read = [self._read(slot, task, piece, 0) for slot in (0, 1)]
        if task.dtype not in FLOATS:
            return contrast_bytes(*read)
        left, right = (
            self._values(slot, spec.dtype, chunk.count) for slot, spec in enumerate(task.inputs)
        )
        return contrast(left, right, self._delta[: chunk.count], self._total[: chunk.count])

    def _inspect(self, chunk: Chunk, task: TensorTask, result: ChunkResult) -> None:
        """Compare or digest inputs; nothing is written."""
        (piece,) = chunk.pieces
        read = [self._read(slot, task, piece, 0) for slot in range(len(task.inputs))]
        if task.operation is Operation.DIGEST:
            result.digests = block_digests(read[0], BITS[task.inputs[0].dtype] // 8)
        elif read[0] != read[1]:
            raise MatchError(
                (),
                f"{task.name} holds other {task.inputs[0].dtype} values in finetuned than in base,"
                " and integers are no part of a diff vector",
                "give --exclude with its name to leave it as the target has it",
                where=task.inputs[0].shard.path,
            )

    def _restore(self, chunk: Chunk, task: TensorTask, result: ChunkResult) -> None:
        """Count the elements of finetuned that base + Δ does not give back; nothing is written.

        Δ has finetuned's order, so it is read and digested from end to end. Its rows that belong
        to no token of base have nothing to be compared with.
        """
        sizes = [BITS[spec.dtype] // 8 for spec in task.inputs]
        dtypes = [spec.dtype for spec in task.inputs]
        whole = Piece(RunKind.GRAFT, 0, chunk.count, (-1, -1, chunk.start))
        result.digests = block_digests(self._read(2, task, whole, 0), sizes[2])
        deltas = self._values(2, dtypes[2], chunk.count)
        for piece in chunk.pieces:
            if piece.kind is RunKind.ZERO:
                continue
            self._read(0, task, piece, 0)
            total = self._total[: piece.count]
            total.copy_(deltas[piece.at : piece.at + piece.count])
            if piece.kind is RunKind.GRAFT:
                read = self._read(1, task, piece, 0)
                if len(task.runs) == 1:
                    result.base_digests = block_digests(read, sizes[1])
                base64 = self._delta[: piece.count]
                base64.copy_(self._values(1, dtypes[1], piece.count))
                total.add_(base64)
            back = self._values(self._result, dtypes[0], piece.count)
            back.copy_(total)
            ours = self._values(0, dtypes[0], piece.count)
            result.inexact += int(np.count_nonzero(ops.different_bits(back, ours)))

    def _read(self, slot: int, task: TensorTask, piece: Piece, at: int) -> memoryview:
        """Read a piece of an input into its buffer, `at` elements from the buffer's start."""
        spec = task.inputs[slot]
        size = BITS[spec.dtype] // 8
        view = self._views[slot][at * size : (at + piece.count) * size]
        self._open_shard(spec).read_into(view, spec.start + piece.sources[slot] * size)
        return view

    def _values(self, slot: int, dtype: str, count: int) -> Tensor:
        """The first elements of a buffer as a tensor of shape `(count,)`, on the CPU."""
        return self._bytes[slot][: count * BITS[dtype] // 8].view(ops.TORCH_DTYPES[dtype])
