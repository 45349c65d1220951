"""Running a plan whose output is processed further, so that a later run goes on where it stopped.

The output of each shard goes to a sink, not to a file. What the sinks write is theirs; the journal
of the output folder has which chunks are done, and what the sinks note of each.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import check_unchanged
from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.writer import write_error
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan
from diffxfer.streaming.run import default_threads
from diffxfer.streaming.sync import SYNC_INTERVAL_S, Syncer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.completed import Completed
    from diffxfer.streaming.engine import Engine, Sink
    from diffxfer.streaming.plan import Chunk
    from diffxfer.streaming.statistics import ChunkResult, TensorResult
    from diffxfer.streaming.sync import Syncable


def process_output(
    plan: Plan,
    folder: OutputFolder,
    completed: Completed,
    *,
    sinks: Mapping[str, Sink],
    files: Collection[Syncable],
    observe: Callable[[Chunk, ChunkResult], None] | None = None,
    further_bytes: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_nonfinite: bool = False,
) -> Sequence[TensorResult]:
    """Run a plan, or the rest of it after an earlier run.

    Args:
        plan: a plan whose chunks have `BLOCK_ELEMENTS` elements.
        folder: the output folder, inside its `with` block.
        completed: what earlier runs did; new chunks are recorded there.
        sinks: what takes the output of each shard of the plan.
        files: the files that the sinks write.
        observe: called with each chunk and its result before `sinks` take it, by any thread.
        further_bytes: about as many bytes are moved after this plan, to say how much is done.
        threads: number of workers; None for one per processor.
        progress: called with the bytes done and the total bytes.
        allow_nonfinite: let NaN, infinity and overflow through.

    Returns:
        One result per task of the plan. Everything that the sinks wrote is durable.

    Raises:
        DiffxferError: the earliest failure; what was done before is kept.
    """
    if not completed.is_whole:
        from diffxfer.streaming.engine import Engine

        _begin(folder, plan.bytes_to_read + further_bytes)
        ready: Future[None] = Future()
        ready.set_result(None)
        engine = Engine(
            *(plan, sinks, dict.fromkeys(plan.layouts, ready), completed),
            chunk_elements=BLOCK_ELEMENTS,
            allow_nonfinite=allow_nonfinite,
            observe=observe,
            counts_writes=False,
        )
        _run(engine, Syncer(folder, files, SYNC_INTERVAL_S), threads, progress)
    for shard in plan.inputs:
        check_unchanged(shard)
    try:
        for file in files:
            file.sync()
    except OSError as exc:
        folder.journal.distrust()
        raise write_error(folder.out, "", exc) from exc
    return completed.statistics.results()


def _begin(folder: OutputFolder, total_bytes: int) -> None:
    try:
        folder.keep_only(())
        folder.journal.begin(total_bytes)
    except OSError as exc:
        raise write_error(folder.out, JOURNAL_NAME, exc) from exc


def _run(
    engine: Engine,
    syncer: Syncer,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    try:
        engine.run(threads or default_threads(), syncer, progress)
    except BaseException as exc:
        syncer.abandon(exc)
        raise
