"""The batches of a device: their layout in the buffers, and their arithmetic.

A batch consists of consecutive chunks with the same arithmetic (blocks of a large tensor, or many
small tensors), or of the grafted rows of one chunk. Each chunk keeps its number, digest and journal
record, so neither the bytes nor a resumed run depend on the size of batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffxfer.checkpoints.stored import BITS
from diffxfer.streaming import torch_ops
from diffxfer.streaming.batch import COMPUTED, alike
from diffxfer.streaming.plan import Operation, RunKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffxfer.streaming.plan import Chunk, Plan, TensorTask

MOST_CHUNKS = 4096
_ALIGNMENT = 256
WORK_BYTES = 3 * 8 + 1
"""Bytes per element that arithmetic takes on the device: three float64 and a flag."""
_DELTA, _BASE, _CHANGED, _INEXACT = range(4)


@dataclass(frozen=True)
class DeviceBatch:
    """The layout of a batch; all its buffers are bytes.

    Attributes:
        operation: the operation.
        alpha: the scale of Δ.
        dtypes: the inputs' dtypes.
        dtype: the output's dtype.
        counts: the number of computed elements of each chunk.
    """

    operation: Operation
    alpha: float
    dtypes: tuple[str, ...]
    dtype: str
    counts: tuple[int, ...]

    @cached_property
    def elements(self) -> int:
        """The number of computed elements."""
        return sum(self.counts)

    @cached_property
    def starts(self) -> list[int]:
        """The offset of each input in the bytes that arrive, and their end."""
        sizes = [_aligned(self.elements * BITS[dtype] // 8) for dtype in self.dtypes]
        return list(accumulate(sizes, initial=0))

    @cached_property
    def out_start(self) -> int:
        """The offset of the output in the bytes that leave; the measurements come before it."""
        measured = 1 + 4 * len(self.counts) if self.operation is Operation.SUBTRACT else 1
        return _aligned(8 * measured)

    @property
    def out_end(self) -> int:
        """The end of the output in the bytes that leave."""
        return self.out_start + self.elements * BITS[self.dtype] // 8

    def input(self, arrived: Tensor, slot: int) -> Tensor:
        """An input, of shape `(elements,)`."""
        return _view(arrived, self.starts[slot], self.dtypes[slot], self.elements)

    def total(self, left: Tensor) -> Tensor:
        """The sum of the output, float64 of shape `()`: finite if every element is."""
        return left[:8].view(torch.float64)[0]

    def measured(self, left: Tensor) -> Tensor:
        """By chunk: ‖Δ‖², ‖base‖², and counts of changed and inexact elements: `(4, chunks)`."""
        return _view(left, 8, "F64", 4 * len(self.counts)).view(4, len(self.counts))


def device_batch_of(chunks: Sequence[Chunk], tasks: Sequence[TensorTask]) -> DeviceBatch | None:
    """The layout of a batch, None if the device does not compute its chunks.

    Args:
        chunks: the chunks of the batch.
        tasks: the plan's tasks.
    """
    first = tasks[chunks[0].task]
    counts = tuple(
        sum(piece.count for piece in chunk.pieces if piece.kind is RunKind.GRAFT)
        for chunk in chunks
    )
    if first.operation not in COMPUTED or not counts[0]:
        return None
    dtypes = tuple(spec.dtype for spec in first.inputs)
    return DeviceBatch(first.operation, first.alpha, dtypes, first.dtype, counts)


def device_batches(
    chunks: Iterable[Chunk], plan: Plan, elements: int
) -> Iterator[tuple[Chunk, ...]]:
    """Group chunks with the same arithmetic that are adjacent in the output.

    Args:
        chunks: the plan's chunks, in order.
        plan: the plan.
        elements: the most elements of a batch.

    Yields:
        Every chunk, in the same order; a chunk that is not all arithmetic comes alone.
    """
    batch: list[Chunk] = []
    size, kind, end = 0, None, -1
    for chunk in chunks:
        task = plan.tasks[chunk.task]
        found, start = alike(chunk, task), task.start + chunk.start * task.itemsize
        full = size + chunk.count > elements or len(batch) == MOST_CHUNKS
        if batch and (found is None or found != kind or start != end or full):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(chunk)
        size, kind, end = size + chunk.count, found, start + chunk.count * task.itemsize
    if batch:
        yield tuple(batch)


def buffer_bytes(plan: Plan, elements: int) -> tuple[int, int]:
    """The most bytes that arrive for a batch of a plan, and the most that leave.

    Args:
        plan: the plan.
        elements: the most elements of a batch.
    """
    tasks = [task for task in plan.tasks if task.operation in COMPUTED]
    arrive = max((sum(BITS[spec.dtype] // 8 for spec in task.inputs) for task in tasks), default=0)
    leave = max((task.itemsize for task in tasks), default=0)
    measured = _aligned(8 * (1 + 4 * MOST_CHUNKS))
    return elements * arrive + 3 * _ALIGNMENT, elements * leave + measured


def compute(batch: DeviceBatch, arrived: Tensor, leaving: Tensor, work: Tensor) -> None:
    """The arithmetic of a batch; every step is a separate kernel, as in `torch_ops`.

    PyTorch's CUDA kernels give the same bits as the CPU: both round float64 sums and products to
    nearest; the factor inside a sum is 1 or −1, so fusing it changes nothing; and both convert
    float64 to 16-bit types by way of float32 (c10's `BFloat16(float)` and `Half(float)`).

    Args:
        batch: its layout.
        arrived: its inputs.
        leaving: receives the measurements and the output.
        work: `WORK_BYTES` per element, overwritten.
    """
    count = batch.elements
    delta, wide, spare = work[: 24 * count].view(torch.float64).view(3, count)
    inputs = [batch.input(arrived, slot) for slot in range(len(batch.dtypes))]
    out = _view(leaving, batch.out_start, batch.dtype, count)
    torch_ops.compute(batch.operation, inputs, batch.alpha, delta, wide, out)
    spare.copy_(out)
    torch.sum(spare, 0, out=batch.total(leaving))
    if batch.operation is Operation.SUBTRACT:
        flags = work[24 * count : 25 * count].view(torch.bool)
        _measure(batch, inputs, out, batch.measured(leaving), (delta, wide, spare, flags))


def _measure(
    batch: DeviceBatch,
    inputs: Sequence[Tensor],
    out: Tensor,
    found: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Measure norms and counts by chunk; overwrites Δ and base in float64."""
    delta, base64, spare, flags = buffers
    ours, theirs = inputs
    for row, values in ((_DELTA, delta), (_BASE, base64)):
        torch.mul(values, values, out=spare)
        _sum_by_chunk(batch, spare, found[row])
    if ours.dtype == theirs.dtype:
        torch.ne(torch_ops.bits(ours), torch_ops.bits(theirs), out=flags)
    else:
        torch.ne(delta, 0.0, out=flags)
    spare.copy_(flags)
    _sum_by_chunk(batch, spare, found[_CHANGED])
    delta.copy_(out)
    delta.add_(base64)
    back = base64.view(ours.dtype)[: len(ours)]
    back.copy_(delta)
    torch.ne(torch_ops.bits(back), torch_ops.bits(ours), out=flags)
    spare.copy_(flags)
    _sum_by_chunk(batch, spare, found[_INEXACT])


def _sum_by_chunk(batch: DeviceBatch, values: Tensor, out: Tensor) -> None:
    """Sum by chunk, with one kernel per run of chunks of equal length, as most chunks have."""
    start = first = 0
    for length, group in groupby(batch.counts):
        many = len(list(group))
        part = values[start : start + many * length].view(many, length)
        torch.sum(part, 1, out=out[first : first + many])
        start, first = start + many * length, first + many


def _view(buffer: Tensor, start: int, dtype: str, count: int) -> Tensor:
    return buffer[start : start + count * BITS[dtype] // 8].view(torch_ops.TORCH_DTYPES[dtype])


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
