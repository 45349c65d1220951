"""Running a plan that writes nothing, to measure its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import check_unchanged
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Plan
from diffxfer.streaming.run import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.streaming.statistics import TensorResult


def measure_inputs(
    plan: Plan,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sequence[TensorResult]:
    """Run a plan without outputs; NaN and infinity are accepted.

    Args:
        plan: a plan whose tasks write nothing.
        threads: number of workers; None for one per processor.
        progress: called with the bytes done and the total bytes.

    Returns:
        One result per task of the plan.

    Raises:
        DiffxferError: the earliest failure: an input that changed, or cannot be read.
    """
    from diffxfer.streaming.engine import Engine

    assert not plan.layouts
    engine = Engine(
        plan,
        {},
        {},
        Completed(plan, BLOCK_ELEMENTS, None),
        chunk_elements=BLOCK_ELEMENTS,
        allow_nonfinite=True,
    )
    results = engine.run(threads or default_threads(), None, progress)
    for shard in plan.inputs:
        check_unchanged(shard)
    return results
