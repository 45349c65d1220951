"""The progress of lm-eval on one model: its requests and those that are answered."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.api.model import CacheHook
    from lm_eval.api.task import Task


@contextmanager
def track_requests(tell: Callable[[int, int], None] | None) -> Iterator[None]:
    """Count requests and answers while lm-eval scores one model inside the block.

    lm-eval has no callback for this. One method builds the requests of every task, and every
    backend passes each answer to the cache hook at once. The exception is `loglikelihood_rolling`,
    whose answers are passed on together at the end.

    Args:
        tell: called with the numbers of answered and built requests; None to count nothing.
    """
    if tell is None:
        yield
        return
    from lm_eval.api.model import CacheHook
    from lm_eval.api.task import Task

    counts = {"answered": 0, "made": 0}
    build, add = Task.build_all_requests, CacheHook.add_partial

    def count(name: str, more: int) -> None:
        counts[name] += more
        tell(min(counts["answered"], counts["made"]), counts["made"])

    def build_and_count(task: Task, *args: Any, **named: Any) -> None:
        build(task, *args, **named)
        count("made", sum(instance.repeats or 1 for instance in task.instances))

    def add_and_count(hook: CacheHook, *args: Any) -> None:
        add(hook, *args)
        count("answered", 1)

    Task.build_all_requests = build_and_count
    CacheHook.add_partial = add_and_count
    try:
        yield
    finally:
        Task.build_all_requests = build
        CacheHook.add_partial = add
