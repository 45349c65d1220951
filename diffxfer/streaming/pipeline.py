"""A run whose arithmetic is a device's: read, copy in, compute, copy out, check, write.

Every thread has a pipeline with two slots. It reads a batch into one of them and lets the device
go on with it, reads the next into the other, and then finishes the older one. What the device does
not do stays with the thread's `Worker`: copies, comparisons, the rows of a chunk that take no
arithmetic, and all of a batch in which something is wrong, chunk by chunk, so that it fails, or
does not, exactly as on the CPU. Digests are taken here, since xxh3 runs on no device and the bytes
come by anyway, and so are samples, which are few; norms and counts come back with the output, 32
bytes a chunk.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import BITS
from diffxfer.errors import DiffxferError, OptionError
from diffxfer.streaming.batch import spans
from diffxfer.streaming.checksum import block_digests
from diffxfer.streaming.device_batch import (
    WORK_BYTES,
    DeviceBatch,
    buffer_bytes,
    compute,
    device_batch_of,
    device_batches,
)
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation, RunKind
from diffxfer.streaming.statistics import ChunkResult
from diffxfer.streaming.worker import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.checkpoints.reader import OpenShard
    from diffxfer.streaming.cuda import Cuda
    from diffxfer.streaming.plan import Chunk, Plan
    from diffxfer.streaming.worker import Worker

    Found = list[tuple[Chunk, ChunkResult]]

SLOTS = 2
"""A pipeline's batches: one is read or written while the device has the other."""
_MOST_ELEMENTS = 1 << 23


class Accelerator:
    """What all pipelines of a run share.

    Args:
        device: which computes.
        plan: what is done.
        threads: how many pipelines there will be.
        memory_bytes: the most that is allocated on the device.

    Attributes:
        elements: the most of a batch.

    Raises:
        OptionError: if that memory does not hold a block for each slot.
        DeviceError: if the device does not have it.
    """

    def __init__(self, device: Cuda, plan: Plan, threads: int, memory_bytes: int) -> None:
        def takes(elements: int) -> int:
            return threads * SLOTS * sum(buffer_bytes(plan, elements)) + elements * WORK_BYTES

        self.elements = BLOCK_ELEMENTS
        if takes(self.elements) > memory_bytes:
            problem = f"{memory_bytes:,} bytes are too few for --threads {threads}, which takes"
            remedy = "give more, or fewer --threads"
            raise OptionError("--device-memory", f"{problem} {takes(self.elements):,}", remedy)
        largest = min(_MOST_ELEMENTS, sum(task.elements for task in plan.tasks))
        while self.elements < largest and takes(2 * self.elements) <= memory_bytes:
            self.elements *= 2
        self.device = device
        self.plan = plan
        self._work = device.memory(self.elements * WORK_BYTES)

    def batches(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ...]]:
        """Put together what is computed in one go.

        Args:
            chunks: of the plan, in its order.
        """
        return device_batches(chunks, self.plan, self.elements)

    def pipeline(
        self,
        worker: Worker,
        *,
        open_shard: Callable[[TensorSpec], OpenShard],
        allow_nonfinite: bool,
    ) -> Pipeline:
        """What a thread does.

        Args:
            worker: does what the device does not.
            open_shard: gives an input file, open.
            allow_nonfinite: let NaN, infinity and overflow through.
        """
        return Pipeline(self, worker, open_shard=open_shard, allow_nonfinite=allow_nonfinite)

    def submit(self, batch: DeviceBatch, slot: Slot) -> torch.cuda.Event:
        """Let the device go on with what was read.

        Args:
            batch: what it is.
            slot: where it is.
        """
        arrive, leave = batch.starts[-1], batch.out_end
        return self.device.submit(
            (slot.device_in[:arrive], slot.host_in[:arrive]),
            lambda: compute(batch, slot.device_in, slot.device_out, self._work),
            (slot.host_out[:leave], slot.device_out[:leave]),
        )


class Slot:
    """Buffers for a batch, here and on the device.

    Args:
        device: which computes.
        sizes: how many bytes arrive at most, and how many leave.
    """

    def __init__(self, device: Cuda, sizes: tuple[int, int]) -> None:
        self.host_in, self.host_out = (device.pinned(size) for size in sizes)
        self.device_in, self.device_out = (device.memory(size) for size in sizes)


@dataclass(frozen=True, slots=True)
class _Flight:
    """Chunks on their way; no `slot` if the device has no part, no `done` if reading failed."""

    chunks: tuple[Chunk, ...]
    batch: DeviceBatch | None = None
    slot: Slot | None = None
    done: torch.cuda.Event | None = None


class Pipeline:
    """One thread's share of a run with a device.

    Args:
        shared: what all pipelines share.
        worker: does what the device does not.
        open_shard: gives an input file, open.
        allow_nonfinite: let NaN, infinity and overflow through.

    Attributes:
        number: of the chunk that is being finished.
    """

    def __init__(
        self,
        shared: Accelerator,
        worker: Worker,
        *,
        open_shard: Callable[[TensorSpec], OpenShard],
        allow_nonfinite: bool,
    ) -> None:
        self.number = -1
        self._shared = shared
        self._tasks = shared.plan.tasks
        self._worker = worker
        self._open_shard = open_shard
        self._allow_nonfinite = allow_nonfinite
        sizes = buffer_bytes(shared.plan, shared.elements)
        self._free = [Slot(shared.device, sizes) for _ in range(SLOTS)]

    def run(self, source: Iterable[tuple[Chunk, ...]]) -> Iterator[tuple[Found, memoryview]]:
        """Compute batches, several of them under way at a time.

        Args:
            source: the batches, taken one by one as slots are free.

        Yields:
            Chunks with what is known of them, in order, and their bytes, which lie side by side in
            the output; valid until the next step.

        Raises:
            DiffxferError: the failure of the chunk that `number` tells.
        """
        flights: deque[_Flight] = deque()
        for chunks in source:
            flights.append(self._begin(chunks))
            if len(flights) == SLOTS:
                yield from self._finish(flights.popleft())
        while flights:
            yield from self._finish(flights.popleft())

    def _begin(self, chunks: tuple[Chunk, ...]) -> _Flight:
        batch = device_batch_of(chunks, self._tasks)
        if batch is None:
            return _Flight(chunks)
        slot = self._free.pop()
        try:
            self._read(chunks, batch, slot)
        except DiffxferError:
            # It fails again, and is told of, when its turn comes: chunks before it come first.
            return _Flight(chunks, batch, slot)
        return _Flight(chunks, batch, slot, self._shared.submit(batch, slot))

    def _read(self, chunks: Sequence[Chunk], batch: DeviceBatch, slot: Slot) -> None:
        """Read what is computed, each input's elements one after the other."""
        view = slot.host_in.numpy().data
        tasks = [self._tasks[chunk.task] for chunk in chunks]
        for place in range(len(batch.dtypes)):
            filled = batch.starts[place]
            for spec, begin, end in spans(chunks, tasks, place):
                self._open_shard(spec).read_into(view[filled : filled + end - begin], begin)
                filled += end - begin

    def _finish(self, flight: _Flight) -> Iterator[tuple[Found, memoryview]]:
        if flight.batch and flight.slot and flight.done:
            self._shared.device.wait(flight.done)
            total = flight.batch.total(flight.slot.host_out).item()
            if self._allow_nonfinite or math.isfinite(total):
                yield self._computed(flight.chunks, flight.batch, flight.slot)
                self._free.append(flight.slot)
                return
        # Here comes also a sum that overflows by itself, and passes.
        for chunk in flight.chunks:
            self.number = chunk.number
            data, result = self._worker.process(chunk, self._tasks[chunk.task])
            yield [(chunk, result)], data
        if flight.slot:
            self._free.append(flight.slot)

    def _computed(
        self, chunks: Sequence[Chunk], batch: DeviceBatch, slot: Slot
    ) -> tuple[Found, memoryview]:
        """What came back, and what is known of it."""
        size = BITS[batch.dtype] // 8
        data = slot.host_out.numpy().data[batch.out_start : batch.out_end]
        found: Found = []
        at = 0
        for place, (chunk, count) in enumerate(zip(chunks, batch.counts, strict=True)):
            self.number = chunk.number
            result = ChunkResult()
            if batch.operation is Operation.SUBTRACT:
                self._tell(result, chunk, batch, slot, place, at)
            part = data[at * size : (at + count) * size]
            if len(chunk.pieces) > 1:  # it came alone
                part = data = self._worker.place(part, chunk, self._tasks[chunk.task], result)
            result.digests = block_digests(part, size)
            found.append((chunk, result))
            at += count
        return found, data

    def _tell(
        self, result: ChunkResult, chunk: Chunk, batch: DeviceBatch, slot: Slot, place: int, at: int
    ) -> None:
        """What was measured of a chunk whose elements begin at `at`, and what base's are."""
        task, count = self._tasks[chunk.task], batch.counts[place]
        delta, base, changed, inexact = batch.measured(slot.host_out)[:, place].tolist()
        result.delta_squares, result.base_squares = (delta,), (base,)
        result.unchanged, result.inexact = count - int(changed), int(inexact)
        grafts = [piece for piece in chunk.pieces if piece.kind is RunKind.GRAFT]
        size = BITS[batch.dtypes[1]] // 8
        read = slot.host_in.numpy().data[batch.starts[1] :]
        theirs = read[at * size : (at + count) * size]
        result.samples = sample(theirs, grafts, chunk, task)
        if len(task.runs) == 1:
            result.base_digests = block_digests(theirs, size)
