"""Running a plan that writes no file, to measure its inputs or to process what it computes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import check_unchanged
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan
from diffxfer.streaming.run import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.streaming.engine import Sink
    from diffxfer.streaming.plan import Chunk
    from diffxfer.streaming.statistics import ChunkResult, TensorResult


def measure_inputs(
    plan: Plan,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    sinks: Mapping[str, Sink] | None = None,
    observe: Callable[[Chunk, ChunkResult], None] | None = None,
    allow_nonfinite: bool = True,
) -> Sequence[TensorResult]:
    """Run a plan without output files.

    Args:
        plan: a plan whose tasks write nothing, or write to `sinks`.
        threads: number of workers; None for one per processor.
        progress: called with the bytes done and the total bytes.
        sinks: what takes the output of each shard of the plan.
        observe: called with each chunk and its result before `sinks` take it, by any thread.
        allow_nonfinite: let NaN, infinity and overflow through.

    Returns:
        One result per task of the plan.

    Raises:
        DiffxferError: the earliest failure: an input that changed, or cannot be read.
    """
    from diffxfer.streaming.engine import Engine

    assert plan.layouts.keys() == (sinks or {}).keys()
    ready: Future[None] = Future()
    ready.set_result(None)
    engine = Engine(
        plan,
        sinks or {},
        dict.fromkeys(plan.layouts, ready),
        Completed(plan, BLOCK_ELEMENTS, None),
        chunk_elements=BLOCK_ELEMENTS,
        allow_nonfinite=allow_nonfinite,
        observe=observe,
    )
    results = engine.run(threads or default_threads(), None, progress)
    for shard in plan.inputs:
        check_unchanged(shard)
    return results
