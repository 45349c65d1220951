"""Starting a run. Importing this module does not import torch."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import check_unchanged
from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import OptionError
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.device import MEMORY_BYTES, check_device
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan, chunks_of
from diffxfer.streaming.sync import SYNC_INTERVAL_S, Syncer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.pipeline import Accelerator
    from diffxfer.streaming.statistics import TensorResult


def default_threads() -> int:
    """One thread per processor of this process, at most eight: a disk cannot supply more."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def check_run_options(threads: int | None, device: str) -> None:
    """Refuse invalid threads and devices; imports torch only for a GPU.

    Args:
        threads: number of workers; None for one per processor.
        device: where the arithmetic runs.

    Raises:
        OptionError: if `threads` is less than one, or there is no such device.
    """
    if threads is not None and threads < 1:
        raise OptionError("--threads", f"{threads} is less than one", "give 1 or more")
    check_device(device)


def run_plan(
    plan: Plan,
    folder: OutputFolder,
    *,
    threads: int | None = None,
    device: str = "cpu",
    device_memory: int = MEMORY_BYTES,
    chunk_elements: int = BLOCK_ELEMENTS,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    earlier_bytes: int = 0,
) -> tuple[Sequence[TensorResult], int]:
    """Write every shard of a plan, or the rest after an earlier run.

    Args:
        plan: the plan.
        folder: the output folder, inside its `with` block.
        threads: number of workers; None for one per processor.
        device: where the arithmetic runs: ``"cpu"``, or a GPU such as ``"cuda:0"``.
        device_memory: the most bytes to allocate on a GPU.
        chunk_elements: the most elements of a chunk, a multiple of `BLOCK_ELEMENTS`.
        allow_nonfinite: let NaN, infinity and overflow through.
        progress: called with the bytes done and the total bytes.
        earlier_bytes: the bytes that an earlier plan of the same job moved.

    Returns:
        One result per task of the plan, and the bytes that an earlier run has moved.

    Raises:
        OptionError: if `threads`, `device` or `device_memory` is invalid.
        DiffxferError: the earliest failure; `folder` keeps or removes what was written.
    """
    check_run_options(threads, device)
    completed, writers = _take_up(plan, folder, chunk_elements, earlier_bytes)
    syncer = Syncer(folder, writers.values(), SYNC_INTERVAL_S)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="allocate") as pool:
        created = {name: pool.submit(writer.create) for name, writer in writers.items()}
        try:
            # This imports torch while the disk reserves space.
            from diffxfer.streaming.engine import Engine

            workers = threads or default_threads()
            with _accelerator(device, plan, workers, device_memory) as accelerator:
                engine = Engine(
                    *(plan, writers, created, completed),
                    chunk_elements=chunk_elements,
                    allow_nonfinite=allow_nonfinite,
                    accelerator=accelerator,
                )
                results = engine.run(workers, syncer, progress)
            for future in created.values():
                future.result()
        except BaseException as exc:
            syncer.abandon(exc)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for shard in plan.inputs:
        check_unchanged(shard)
    return results, completed.resumed_bytes


@contextmanager
def _accelerator(
    device: str, plan: Plan, threads: int, memory_bytes: int
) -> Iterator[Accelerator | None]:
    """The accelerator, or None for the CPU; on exit, waits for its work and closes it."""
    if device == "cpu":
        yield None
        return
    from diffxfer.streaming import cuda
    from diffxfer.streaming.pipeline import Accelerator

    gpu = cuda.Cuda(device)
    try:
        yield Accelerator(gpu, plan, threads, memory_bytes)
    finally:
        gpu.close()


def _take_up(
    plan: Plan, folder: OutputFolder, chunk_elements: int, earlier_bytes: int
) -> tuple[Completed, dict[str, ShardWriter]]:
    """The completed chunks of an earlier run, and the writers for the rest."""
    try:
        completed = Completed(plan, chunk_elements, folder)
        writers = _writers(plan, folder, chunk_elements, completed)
        if not all(writers[name].is_sound() for name in completed.written):
            completed.forget()  # its files were changed
            writers = _writers(plan, folder, chunk_elements, completed)
        folder.keep_only(completed.written)
        folder.journal.begin(earlier_bytes + plan.bytes_to_read + plan.bytes_to_write)
    except OSError as exc:
        raise write_error(folder.out, JOURNAL_NAME, exc) from exc
    return completed, writers


def _writers(
    plan: Plan, folder: OutputFolder, chunk_elements: int, completed: Completed
) -> dict[str, ShardWriter]:
    pending = Counter[str]()
    for task in plan.tasks:
        if task.shard is not None:
            pending[task.shard] += chunks_of(task, chunk_elements)
    done = completed.written
    return {
        name: ShardWriter(folder, name, layout, pending[name] - done[name], begun=name in done)
        for name, layout in plan.layouts.items()
    }
