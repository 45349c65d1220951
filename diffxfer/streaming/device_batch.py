"""What a device computes in one go, where it lies in the buffers, and the arithmetic.

A batch is made of consecutive chunks that are computed alike, blocks of a large tensor or many
small tensors, or of the grafted rows of one chunk. Each chunk keeps its own number, digest and
place in the journal, so that neither the bytes nor a continued run depend on a batch's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffxfer.checkpoints.header import BITS
from diffxfer.streaming import torch_ops
from diffxfer.streaming.batch import COMPUTED, alike
from diffxfer.streaming.plan import Operation, RunKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffxfer.streaming.plan import Chunk, Plan, TensorTask

MOST_CHUNKS = 4096
_ALIGNMENT = 256
WORK_BYTES = 3 * 8 + 1
"""What arithmetic takes on the device, an element: three float64 and a flag."""
_DELTA, _BASE, _CHANGED, _INEXACT = range(4)


@dataclass(frozen=True)
class DeviceBatch:
    """The shape of a batch; all its buffers are bytes.

    Attributes:
        operation: what is computed.
        alpha: the scale of Δ.
        dtypes: of the inputs.
        dtype: of the output.
        counts: the computed elements of each chunk.
    """

    operation: Operation
    alpha: float
    dtypes: tuple[str, ...]
    dtype: str
    counts: tuple[int, ...]

    @cached_property
    def elements(self) -> int:
        """How many elements are computed."""
        return sum(self.counts)

    @cached_property
    def starts(self) -> list[int]:
        """Where each input begins among the bytes that arrive, and where they end."""
        sizes = [_aligned(self.elements * BITS[dtype] // 8) for dtype in self.dtypes]
        return list(accumulate(sizes, initial=0))

    @cached_property
    def out_start(self) -> int:
        """Where the output begins among the bytes that leave; before it is what was measured."""
        measured = 1 + 4 * len(self.counts) if self.operation is Operation.SUBTRACT else 1
        return _aligned(8 * measured)

    @property
    def out_end(self) -> int:
        """Where the output ends."""
        return self.out_start + self.elements * BITS[self.dtype] // 8

    def input(self, arrived: Tensor, slot: int) -> Tensor:
        """An input, of shape `(elements,)`."""
        return _view(arrived, self.starts[slot], self.dtypes[slot], self.elements)

    def total(self, left: Tensor) -> Tensor:
        """The sum of the output, float64 of shape `()`: finite if every element is."""
        return left[:8].view(torch.float64)[0]

    def measured(self, left: Tensor) -> Tensor:
        """By chunk, ‖Δ‖², ‖base‖², and how many elements changed and are inexact: `(4, chunks)`."""
        return _view(left, 8, "F64", 4 * len(self.counts)).view(4, len(self.counts))


def device_batch_of(chunks: Sequence[Chunk], tasks: Sequence[TensorTask]) -> DeviceBatch | None:
    """The shape of chunks that came together, None for what a device does not compute.

    Args:
        chunks: they.
        tasks: of the plan.
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
    """Put chunks together that are computed alike and lie side by side in the output.

    Args:
        chunks: of the plan, in its order.
        plan: what they are cut from.
        elements: the most of a batch.

    Yields:
        Every chunk, in the same order; one that is not all arithmetic comes alone.
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
    """How many bytes arrive for a batch of a plan at most, and how many leave.

    Args:
        plan: what batches are made of.
        elements: the most of a batch.
    """
    tasks = [task for task in plan.tasks if task.operation in COMPUTED]
    arrive = max((sum(BITS[spec.dtype] // 8 for spec in task.inputs) for task in tasks), default=0)
    leave = max((task.itemsize for task in tasks), default=0)
    measured = _aligned(8 * (1 + 4 * MOST_CHUNKS))
    return elements * arrive + 3 * _ALIGNMENT, elements * leave + measured


def compute(batch: DeviceBatch, arrived: Tensor, leaving: Tensor, work: Tensor) -> None:
    """The arithmetic of a batch; every step is a kernel of its own, as in `torch_ops`.

    PyTorch's CUDA kernels give the CPU's bits: float64 sums and products are rounded to nearest
    there as here; a sum's own factor is 1 or −1, so fusing that changes nothing; and float64
    becomes a 16-bit type by way of float32 on both (c10's `BFloat16(float)` and `Half(float)`).

    Args:
        batch: its shape.
        arrived: its inputs.
        leaving: receives what was measured, and the output.
        work: `WORK_BYTES` an element, overwritten.
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
    """Norms and counts by chunk; Δ and base in float64 are overwritten."""
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
    """One kernel for all neighbours of one length, which most chunks are."""
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
