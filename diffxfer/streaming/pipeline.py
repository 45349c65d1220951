"""Running arithmetic on a device: read, copy in, compute, copy out, check, write.

Every thread has a pipeline with two slots. It reads a batch into one slot and submits it to the
device, reads the next batch into the other slot, and then finishes the older one. The thread's
`Worker` does the rest: copies, comparisons and rows without arithmetic. It also repeats a batch
with a non-finite result chunk by chunk, so that it fails, or does not, exactly as on the CPU.
Digests are computed on the CPU, since xxh3 does not run on a device and the bytes pass through
anyway; so are samples, which are few. Norms and counts come back with the output, 32 bytes per
chunk.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import BITS, Files, ShardFile
from diffxfer.errors import DiffxferError, OptionError
from diffxfer.streaming.batch import read_grafted
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

    from diffxfer.checkpoints.files import OpenShard
    from diffxfer.streaming.cuda import Cuda
    from diffxfer.streaming.plan import Chunk, Plan
    from diffxfer.streaming.worker import Worker

    Found = list[tuple[Chunk, ChunkResult]]

SLOTS = 2
"""Batches per pipeline: one is read or written while the device computes the other."""
_MOST_ELEMENTS = 1 << 23


class Accelerator:
    """The state that all pipelines of a run share.

    Args:
        device: the device.
        plan: the plan.
        threads: number of pipelines.
        memory_bytes: the most bytes to allocate on the device.

    Attributes:
        elements: the most elements of a batch.

    Raises:
        OptionError: if `memory_bytes` does not hold a block for each slot.
        DeviceError: if the device does not have that memory.
    """

    def __init__(self, device: Cuda, plan: Plan, threads: int, memory_bytes: int) -> None:
        def takes(elements: int) -> int:
            return threads * SLOTS * sum(buffer_bytes(plan, elements)) + elements * WORK_BYTES

        self.elements = BLOCK_ELEMENTS
        if takes(self.elements) > memory_bytes:
            problem = f"{memory_bytes:,} bytes are too few: --threads {threads} needs"
            remedy = "give more, or fewer --threads"
            raise OptionError("--device-memory", f"{problem} {takes(self.elements):,}", remedy)
        largest = min(_MOST_ELEMENTS, sum(task.elements for task in plan.tasks))
        while self.elements < largest and takes(2 * self.elements) <= memory_bytes:
            self.elements *= 2
        self.device = device
        self.plan = plan
        self._work = device.memory(self.elements * WORK_BYTES)

    def batches(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ...]]:
        """Group chunks into batches.

        Args:
            chunks: the plan's chunks, in order.
        """
        return device_batches(chunks, self.plan, self.elements)

    def pipeline(
        self,
        worker: Worker,
        *,
        open_shard: Callable[[ShardFile], OpenShard],
        allow_nonfinite: bool,
    ) -> Pipeline:
        """The pipeline of a thread.

        Args:
            worker: does the work that the device does not do.
            open_shard: opens an input file.
            allow_nonfinite: let NaN, infinity and overflow through.
        """
        return Pipeline(self, worker, open_shard=open_shard, allow_nonfinite=allow_nonfinite)

    def submit(self, batch: DeviceBatch, slot: Slot) -> torch.cuda.Event:
        """Submit a batch to the device.

        Args:
            batch: the layout of the batch.
            slot: the slot that it was read into.
        """
        arrive, leave = batch.starts[-1], batch.out_end
        return self.device.submit(
            (slot.device_in[:arrive], slot.host_in[:arrive]),
            lambda: compute(batch, slot.device_in, slot.device_out, self._work),
            (slot.host_out[:leave], slot.device_out[:leave]),
        )


class Slot:
    """Buffers for a batch, on the host and on the device.

    Args:
        device: the device.
        sizes: the most bytes that arrive, and the most that leave.
    """

    def __init__(self, device: Cuda, sizes: tuple[int, int]) -> None:
        self.host_in, self.host_out = (device.pinned(size) for size in sizes)
        self.device_in, self.device_out = (device.memory(size) for size in sizes)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch in flight; no `slot` if the device has no part in it, no `done` if reading failed."""

    chunks: tuple[Chunk, ...]
    batch: DeviceBatch | None = None
    slot: Slot | None = None
    done: torch.cuda.Event | None = None


class Pipeline:
    """One thread's share of a run with a device.

    Args:
        shared: the state that all pipelines share.
        worker: does the work that the device does not do.
        open_shard: opens an input file.
        allow_nonfinite: let NaN, infinity and overflow through.

    Attributes:
        number: the number of the chunk that is being finished.
    """

    def __init__(
        self,
        shared: Accelerator,
        worker: Worker,
        *,
        open_shard: Callable[[ShardFile], OpenShard],
        allow_nonfinite: bool,
    ) -> None:
        self.number = -1
        self._shared = shared
        self._tasks = shared.plan.tasks
        self._worker = worker
        self._files = Files(open_shard, worker.shared)
        self._allow_nonfinite = allow_nonfinite
        sizes = buffer_bytes(shared.plan, shared.elements)
        self._free = [Slot(shared.device, sizes) for _ in range(SLOTS)]

    def run(self, source: Iterable[tuple[Chunk, ...]]) -> Iterator[tuple[Found, memoryview]]:
        """Compute batches, with several in flight.

        Args:
            source: the batches, taken one by one when a slot is free.

        Yields:
            Chunks with their results, in order, and their bytes, which are adjacent in the output;
            valid until the next step.

        Raises:
            DiffxferError: the failure of the chunk with the number `number`.
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
            # It is read again, and the failure raised, when its turn comes: earlier chunks first.
            return _Flight(chunks, batch, slot)
        return _Flight(chunks, batch, slot, self._shared.submit(batch, slot))

    def _read(self, chunks: Sequence[Chunk], batch: DeviceBatch, slot: Slot) -> None:
        """Read the inputs of a batch, one input after the other."""
        view = slot.host_in.numpy().data
        tasks = [self._tasks[chunk.task] for chunk in chunks]
        for place in range(len(batch.dtypes)):
            read_grafted(self._files, chunks, tasks, place, view[batch.starts[place] :])

    def _finish(self, flight: _Flight) -> Iterator[tuple[Found, memoryview]]:
        if flight.batch and flight.slot and flight.done:
            self._shared.device.wait(flight.done)
            total = flight.batch.total(flight.slot.host_out).item()
            if self._allow_nonfinite or math.isfinite(total):
                yield self._computed(flight.chunks, flight.batch, flight.slot)
                self._free.append(flight.slot)
                return
        # A batch of finite elements whose sum overflows also comes here, and passes.
        for chunk in flight.chunks:
            self.number = chunk.number
            data, result = self._worker.process(chunk, self._tasks[chunk.task])
            yield [(chunk, result)], data
        if flight.slot:
            self._free.append(flight.slot)

    def _computed(
        self, chunks: Sequence[Chunk], batch: DeviceBatch, slot: Slot
    ) -> tuple[Found, memoryview]:
        """The chunks of a computed batch with their results, and the bytes."""
        size = BITS[batch.dtype] // 8
        data = slot.host_out.numpy().data[batch.out_start : batch.out_end]
        found: Found = []
        at = 0
        for place, (chunk, count) in enumerate(zip(chunks, batch.counts, strict=True)):
            self.number = chunk.number
            result = ChunkResult()
            if batch.operation is Operation.SUBTRACT:
                self._tell(result, chunk, batch, slot, place, at)
            elif self._tasks[chunk.task].expected is not None:
                self._digest_first(result, chunk, batch, slot, at, count)
            part = data[at * size : (at + count) * size]
            if len(chunk.pieces) > 1:  # it came alone
                part = data = self._worker.place(part, chunk, self._tasks[chunk.task], result)
            result.digests = block_digests(part, size)
            found.append((chunk, result))
            at += count
        return found, data

    def _digest_first(
        self, result: ChunkResult, chunk: Chunk, batch: DeviceBatch, slot: Slot, at: int, count: int
    ) -> None:
        """Digest the first input of a chunk, if it is read in order."""
        if len(self._tasks[chunk.task].runs) == 1:
            size = BITS[batch.dtypes[0]] // 8
            read = slot.host_in.numpy().data[batch.starts[0] :]
            result.input_digests = block_digests(read[at * size : (at + count) * size], size)

    def _tell(
        self, result: ChunkResult, chunk: Chunk, batch: DeviceBatch, slot: Slot, place: int, at: int
    ) -> None:
        """Store the measurements of a chunk, whose elements begin at `at`, and digest its base."""
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
            result.input_digests = block_digests(theirs, size)
