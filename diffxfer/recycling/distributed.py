"""What one of several processes does for all of them, such as looking at the disk and writing.

Imports accelerate: only what trains imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.utils import broadcast_object_list

from diffxfer.errors import DiffxferError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trl import SFTConfig

T = TypeVar("T")


def run_in_first_process(config: SFTConfig, action: Callable[[], T]) -> T:
    """Do something in the first process, while the others wait for what comes of it.

    Without being told that it failed, they would wait for the first process where it no longer is,
    and bury its one line below tracebacks of their own.

    Args:
        config: the Trainer's settings, which know the processes.
        action: what to do; other processes get what it returns as a copy, by pickle.

    Returns:
        What it returned, in every process.

    Raises:
        DiffxferError: what it raised; in the other processes a `TrainingError` of the same text.
    """
    refusal: DiffxferError | None = None
    told: list[Any] = [None, None]
    if config.process_index == 0:
        try:
            told[0] = action()
        except DiffxferError as exc:
            refusal, told[1] = exc, str(exc)
    if config.world_size > 1:
        broadcast_object_list(told)
    if refusal is not None:
        raise refusal
    if told[1] is not None:
        raise TrainingError("", f"the first process refused: {told[1]}")
    result: T = told[0]
    return result
