"""Starting a run. Importing this module does not import torch."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import check_unchanged
from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import OptionError
from diffxfer.streaming.accelerator import open_accelerator
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.device import MEMORY_BYTES, check_device
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan, chunks_of
from diffxfer.streaming.sync import SYNC_INTERVAL_S, Syncer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.distribute import Cluster
    from diffxfer.streaming.parts import Workload
    from diffxfer.streaming.statistics import TensorResult


def default_threads() -> int:
    """One thread per processor of this process, at most eight: a disk cannot supply more."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def check_run_options(threads: int | None, device: str, cluster: Cluster | None = None) -> None:
    """Refuse invalid threads and devices; imports torch only for a GPU.

    Args:
        threads: number of workers; None for one per processor.
        device: where the arithmetic runs.
        cluster: where the work is done: its nodes have the device, not this machine.

    Raises:
        OptionError: if `threads` is less than one, or there is no such device.
    """
    if threads is not None and threads < 1:
        raise OptionError("--threads", f"{threads} is less than one", "give 1 or more")
    if cluster is None:
        check_device(device)
    elif device not in ("cpu", "cuda"):
        problem = f"{device} has no meaning on a cluster"
        raise OptionError("--device", problem, "give cpu, or cuda for one GPU a part")


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
    cluster: Cluster | None = None,
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
        cluster: where the plan runs in parts; None for this process.
        earlier_bytes: the bytes that an earlier plan of the same job moved.

    Returns:
        One result per task of the plan, and the bytes that an earlier run has moved.

    Raises:
        OptionError: if `threads`, `device` or `device_memory` is invalid.
        DiffxferError: the earliest failure; `folder` keeps or removes what was written.
    """
    if cluster is None:
        check_run_options(threads, device)
    completed, writers = _take_up(plan, folder, chunk_elements, earlier_bytes)
    resumed = completed.resumed_bytes
    if cluster is None:
        how = threads or default_threads(), device, device_memory, chunk_elements
        _run_here(plan, folder, completed, writers, how, allow_nonfinite, progress)
    else:
        from diffxfer.streaming.distribute import write_parts

        more = cluster.threads(threads), device, device_memory, allow_nonfinite, chunk_elements
        load = _workload(folder, *more)
        write_parts(plan, folder, completed, writers.values(), cluster, load, progress)
    for shard in plan.inputs:
        check_unchanged(shard)
    return completed.results(), resumed


def _workload(
    folder: OutputFolder,
    threads: int,
    device: str,
    device_memory: int,
    allow_nonfinite: bool,
    chunk_elements: int,
) -> Workload:
    """How every part of a plan is run on a cluster."""
    from diffxfer.streaming.parts import Workload

    return Workload(
        out=folder.out,
        partial=folder.partial,
        fingerprint=folder.journal.fingerprint,
        run=secrets.token_hex(4),
        threads=threads,
        device=device,
        device_memory=device_memory,
        allow_nonfinite=allow_nonfinite,
        chunk_elements=chunk_elements,
    )


def _run_here(
    plan: Plan,
    folder: OutputFolder,
    completed: Completed,
    writers: dict[str, ShardWriter],
    how: tuple[int, str, int, int],
    allow_nonfinite: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Run a plan in this process, with its threads, device, device memory and size of chunks."""
    threads, device, device_memory, chunk_elements = how
    syncer = Syncer(folder, writers.values(), SYNC_INTERVAL_S)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="allocate") as pool:
        created = {name: pool.submit(writer.create) for name, writer in writers.items()}
        try:
            # This imports torch while the disk reserves space.
            from diffxfer.streaming.engine import Engine

            with open_accelerator(device, plan, threads, device_memory) as accelerator:
                engine = Engine(
                    *(plan, writers, created, completed),
                    chunk_elements=chunk_elements,
                    allow_nonfinite=allow_nonfinite,
                    accelerator=accelerator,
                )
                engine.run(threads, syncer, progress)
            for future in created.values():
                future.result()
        except BaseException as exc:
            syncer.abandon(exc)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _take_up(
    plan: Plan, folder: OutputFolder, chunk_elements: int, earlier_bytes: int
) -> tuple[Completed, dict[str, ShardWriter]]:
    """The completed chunks of an earlier run, and the writers for the rest."""
    try:
        completed = Completed(plan, chunk_elements, folder)
        total = earlier_bytes + plan.bytes_to_read + plan.bytes_to_write
        folder.journal.begin(total)
        completed.absorb_parts(folder.partial)
        writers = _writers(plan, folder, chunk_elements, completed)
        if not all(writers[name].is_sound() for name in completed.written):
            completed.forget()  # its files were changed
            folder.journal.begin(total)
            writers = _writers(plan, folder, chunk_elements, completed)
        folder.keep_only(completed.written)
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
