"""Computing single tensors of a plan in memory, with the bits that a run would write."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.files import OpenShard, check_unchanged
from diffxfer.kernels.processor import use_default_settings
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan, chunks, chunks_of
from diffxfer.streaming.run import default_threads
from diffxfer.streaming.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.streaming.plan import Chunk, TensorTask
    from diffxfer.streaming.statistics import TensorResult

_OPEN_INPUTS = 8
_MAPPED = 1 << 18


def new_bytes(size: int) -> NDArray[np.uint8]:
    """Memory for a tensor, which goes back to the system when the tensor is dropped.

    Memory of that size from `malloc` is often kept by the process: loading a mixture of experts,
    whose tensors are stacked and dropped, took three times the model.

    Args:
        size: its size in bytes.
    """
    return (
        np.frombuffer(mmap.mmap(-1, size), np.uint8) if size > _MAPPED else np.empty(size, np.uint8)
    )


class TensorMaker:
    """Computes tensors in memory, on threads of its own.

    Its threads have the floating-point settings that exact results need, so those of the caller's
    thread have no effect and stay as they are. Several threads may call `make` at once.

    Args:
        allow_nonfinite: let NaN, infinity and overflow through.
        threads: number of threads; None for one per processor.
    """

    def __init__(self, *, allow_nonfinite: bool = False, threads: int | None = None) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._threads = threads or default_threads()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            self._threads, thread_name_prefix="tensor", initializer=use_default_settings
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def make(self, task: TensorTask) -> tuple[NDArray[np.uint8], TensorResult]:
        """Compute a tensor.

        Args:
            task: a task of a plan, with an output.

        Returns:
            The tensor's bytes, and its result.

        Raises:
            NonFiniteError: at NaN, infinity or overflow, unless they are allowed.
            CheckpointError: if an input cannot be read, or has changed.
        """
        assert task.shard is not None
        out = new_bytes(task.elements * task.itemsize)
        plan = Plan((task,), {}, ())
        completed = Completed(plan, BLOCK_ELEMENTS, None)
        source = _Source(chunks(plan))
        count = min(self._threads, chunks_of(task, BLOCK_ELEMENTS))
        running = [
            self._pool.submit(self._work, task, source, out, completed) for _ in range(count)
        ]
        failures = list(chain.from_iterable(future.result() for future in running))
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        for shard in {
            part.shard.path: part.shard for i in task.inputs for part in i.parts
        }.values():
            check_unchanged(shard)
        return out, completed.statistics.results()[0]

    def _work(
        self, task: TensorTask, source: _Source, out: NDArray[np.uint8], completed: Completed
    ) -> list[tuple[int, Exception]]:
        """Compute chunks until there are none; returns the failure with the chunk's number."""
        view, size = out.data, task.itemsize
        while chunk := source.next():
            try:
                data, result = self._worker().process(chunk, task)
                at = chunk.start * size
                view[at : at + len(data)] = data
                completed.add([(chunk, 0, result)])
            except Exception as exc:
                source.stop()
                return [(chunk.number, exc)]
        return []

    def _worker(self) -> Worker:
        """This thread's worker."""
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(
                BLOCK_ELEMENTS,
                allow_nonfinite=self._allow_nonfinite,
                open_shard=_Inputs().open,
            )
        worker: Worker = self._local.worker
        return worker


class _Source:
    """The chunks of a tensor, which several threads take in order."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._lock = threading.Lock()
        self._stopped = False

    def next(self) -> Chunk | None:
        with self._lock:
            return None if self._stopped else next(self._chunks, None)

    def stop(self) -> None:
        self._stopped = True


class _Inputs:
    """The last few input files of one thread, open for reading."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, OpenShard] = OrderedDict()

    def open(self, shard: ShardFile) -> OpenShard:
        found = self._open.get(shard.path)
        if found is None:
            found = self._open[shard.path] = OpenShard(shard)
            if len(self._open) > _OPEN_INPUTS:
                self._open.popitem(last=False)
        return found
