"""Starting a run. Importing this module does not import torch: that happens beside other work."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from diffxfer.checkpoints.reader import check_unchanged
from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan, chunks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.tally import TensorResult


def default_threads() -> int:
    """As many threads as this process has processors, eight at most: a disk feeds no more."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def run_plan(
    plan: Plan,
    folder: OutputFolder,
    *,
    threads: int | None = None,
    device: str = "cpu",
    chunk_elements: int = BLOCK_ELEMENTS,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Sequence[TensorResult]:
    """Write every shard of a plan.

    Args:
        plan: what to do.
        folder: where, inside its `with` block.
        threads: how many workers; None for one a processor.
        device: where the arithmetic runs, as torch names it.
        chunk_elements: the most elements of a chunk, a multiple of `BLOCK_ELEMENTS`.
        allow_nonfinite: let NaN, infinity and overflow through.
        progress: called with the bytes done and the bytes in all.

    Returns:
        One result a task of the plan.

    Raises:
        DiffxferError: the earliest failure; what was written is the folder's to remove.
    """
    pending = Counter[str]()
    for task in plan.tasks:
        if task.shard is not None:
            pending[task.shard] += chunks_of(task, chunk_elements)
    writers = {
        name: ShardWriter(folder, name, layout, pending[name])
        for name, layout in plan.layouts.items()
    }
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="allocate") as pool:
        created = {name: pool.submit(writer.create) for name, writer in writers.items()}
        try:
            # On tmpfs, allocation takes a quarter of a second a GB; importing torch covers it.
            from diffxfer.streaming.engine import Engine

            engine = Engine(
                plan,
                writers,
                created,
                chunk_elements=chunk_elements,
                device=device,
                allow_nonfinite=allow_nonfinite,
            )
            results = engine.run(threads or default_threads(), progress)
            for future in created.values():
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for shard in plan.inputs:
        check_unchanged(shard)
    return results
