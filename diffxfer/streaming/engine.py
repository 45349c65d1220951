"""Running a plan in bounded memory; the number of threads does not change the bytes.

Workers take chunks from one source, in order. When a chunk fails, the chunks taken before it are
finished first, so that the earliest failure is reported and the same run always fails with the
same message.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from diffxfer.checkpoints.files import OpenShard
from diffxfer.checkpoints.shared import Shared
from diffxfer.kernels.processor import use_default_settings
from diffxfer.streaming.batch import batches
from diffxfer.streaming.plan import Chunk, Plan, TensorTask, chunks, inputs_used
from diffxfer.streaming.worker import Worker

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.streaming.completed import Record
    from diffxfer.streaming.pipeline import Accelerator
    from diffxfer.streaming.statistics import ChunkResult, TensorResult
    from diffxfer.streaming.sync import Syncer

Progress = Callable[[int, int], None]
"""Called with the bytes read and written so far, and the total."""

_OPEN_INPUTS = 24
_PROGRESS_INTERVAL_S = 0.1


class Sink(Protocol):
    """What takes the output of a shard: a `ShardWriter`, or what processes the bytes further."""

    def write(self, data: memoryview, offset: int, parts: int = 1) -> None:
        """Take bytes; any thread may call it, in any order.

        Args:
            data: the bytes, valid during the call.
            offset: their offset in the shard.
            parts: the number of chunks.
        """

    def close(self) -> None:
        """Release what it holds; no write is in progress."""


class Engine:
    """One run of a plan.

    Args:
        plan: the plan.
        writers: every output shard by name.
        created: futures, by shard name, that are done when the shard is allocated.
        completed: the completed chunks; new ones are recorded there.
        chunk_elements: the most elements of a chunk, a multiple of `plan.BLOCK_ELEMENTS`.
        allow_nonfinite: let NaN, infinity and overflow through.
        accelerator: computes instead of the workers, if there is one.
        observe: called with each chunk and its result before its bytes are written, by any thread.
        counts_writes: whether what the writers take counts as bytes written.
    """

    def __init__(
        self,
        plan: Plan,
        writers: Mapping[str, Sink],
        created: Mapping[str, Future[None]],
        completed: Record,
        *,
        chunk_elements: int,
        allow_nonfinite: bool,
        accelerator: Accelerator | None = None,
        observe: Callable[[Chunk, ChunkResult], None] | None = None,
        counts_writes: bool = True,
    ) -> None:
        assert accelerator is None or chunk_elements <= accelerator.elements
        self._plan = plan
        self._writers = writers
        self._created = created
        self._chunk_elements = chunk_elements
        self._accelerator = accelerator
        self._allow_nonfinite = allow_nonfinite
        self._observe = observe
        self._lock = threading.Lock()
        self._completed = completed
        rest = chunks(plan, chunk_elements, completed)
        self._source = accelerator.batches(rest) if accelerator else batches(rest, plan)
        self._shared = Shared()
        self._open: OrderedDict[Path, OpenShard] = OrderedDict()
        self._failures: list[tuple[int, BaseException]] = []
        self._done_bytes = completed.resumed_bytes
        self._counts_writes = counts_writes
        self._total_bytes = plan.bytes_to_read + counts_writes * plan.bytes_to_write
        self._stop = False

    def run(
        self, threads: int, syncer: Syncer | None, progress: Progress | None
    ) -> Sequence[TensorResult]:
        """Run the plan.

        Args:
            threads: number of workers.
            syncer: called from this thread, as often as `progress`; None if nothing is written.
            progress: called from this thread, about ten times a second.

        Returns:
            One result per task.

        Raises:
            DiffxferError: the earliest failure in the order of the plan.
        """
        if progress is not None and self._done_bytes:
            progress(self._done_bytes, self._total_bytes)
        workers: list[threading.Thread] = []
        try:
            for _ in range(threads):
                worker = threading.Thread(target=self._work, daemon=True)
                worker.start()
                workers.append(worker)
            self._wait(workers, syncer, progress)
        finally:
            self._stop = True
            for worker in workers:
                self._end(worker)
            self._open.clear()
            for writer in self._writers.values():
                writer.close()
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        if syncer is not None:
            syncer.finish()
        if progress is not None:
            progress(self._total_bytes, self._total_bytes)
        return self._completed.results()

    def _end(self, worker: threading.Thread) -> None:
        """Wait for a worker, but not for its requests to the Hub if the run is interrupted."""
        while worker.is_alive():
            with self._lock:
                opened = [*self._open.values()]
            for shard in opened:
                shard.abandon()
            worker.join(_PROGRESS_INTERVAL_S)

    def _wait(
        self, workers: Sequence[threading.Thread], syncer: Syncer | None, progress: Progress | None
    ) -> None:
        for worker in workers:
            while worker.is_alive():
                worker.join(_PROGRESS_INTERVAL_S)
                if syncer is not None:
                    syncer.tick()
                if progress is not None:
                    progress(self._done_bytes, self._total_bytes)

    def _work(self) -> None:
        number, pipeline = -1, None
        try:
            use_default_settings()
            worker = Worker(
                self._chunk_elements,
                allow_nonfinite=self._allow_nonfinite,
                open_shard=self._input,
                shared=self._shared,
            )
            if self._accelerator is not None:
                pipeline = self._accelerator.pipeline(
                    worker, open_shard=self._input, allow_nonfinite=self._allow_nonfinite
                )
                for found, data in pipeline.run(iter(self._next, ())):
                    self._put(found, data)
                return
            while batch := self._next():
                number = batch[0].number
                if len(batch) == 1 or not self._many(worker, batch):
                    for chunk in batch:
                        self._one(worker, chunk)
        except BaseException as exc:
            with self._lock:
                self._failures.append((pipeline.number if pipeline else number, exc))
                self._stop = True

    def _next(self) -> tuple[Chunk, ...]:
        with self._lock:
            return () if self._stop else next(self._source, ())

    def _one(self, worker: Worker, chunk: Chunk) -> None:
        task = self._plan.tasks[chunk.task]
        data, result = worker.process(chunk, task)
        self._put([(chunk, result)], data)

    def _put(self, found: Sequence[tuple[Chunk, ChunkResult]], data: memoryview) -> None:
        """Write the bytes of adjacent chunks, and record the chunks."""
        first = found[0][0]
        task = self._plan.tasks[first.task]
        if self._observe is not None:
            for chunk, result in found:
                self._observe(chunk, result)
        if task.shard is not None:
            self._created[task.shard].result()
            start = task.start + first.start * task.itemsize
            self._writers[task.shard].write(data, start, parts=len(found))
        self._record(
            [
                (chunk, self._moved_by(chunk, self._plan.tasks[chunk.task]), result)
                for chunk, result in found
            ]
        )

    def _many(self, worker: Worker, batch: Sequence[Chunk]) -> bool:
        """Process a batch at once; returns False if a tensor is not finite and must be found."""
        tasks = [self._plan.tasks[chunk.task] for chunk in batch]
        done = worker.process_many(batch, tasks)
        first = tasks[0]
        if done is None or first.shard is None:
            return False
        data, results = done
        self._put(list(zip(batch, results, strict=True)), data)
        return True

    def _record(self, done: Sequence[tuple[Chunk, int, ChunkResult]]) -> None:
        self._completed.add(done)
        with self._lock:
            self._done_bytes += sum(moved for _, moved, _ in done)

    def _moved_by(self, chunk: Chunk, task: TensorTask) -> int:
        """The bytes read and written for a chunk."""
        read = sum(
            task.inputs[slot].bytes_to_read(piece.count)
            for piece in chunk.pieces
            for slot in inputs_used(piece.kind, len(task.inputs))
        )
        writes = self._counts_writes and task.shard is not None
        return read + (chunk.count * task.itemsize if writes else 0)

    def _input(self, shard: ShardFile) -> OpenShard:
        """An open shard; only the last few are kept open."""
        path = shard.path
        with self._lock:
            found = self._open.get(path)
            if found is None:
                found = self._open[path] = OpenShard(shard)
                if len(self._open) > _OPEN_INPUTS:
                    # It is closed when the last worker that reads from it drops its reference.
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return found
