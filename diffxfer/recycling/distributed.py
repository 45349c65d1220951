"""Work that the first of several training processes does for all of them.

The module imports accelerate; only code that trains may import it.
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
    """Run a function in the first process and return its result in every process.

    If it fails, the other processes fail too. Otherwise they would wait for the first process in
    the next collective operation, and their tracebacks would hide its one-line error.

    Args:
        config: the Trainer's settings, which know the processes.
        action: the function; the other processes receive its result as a pickled copy.

    Returns:
        The result of the function.

    Raises:
        DiffxferError: the error of the function; in the other processes, a `TrainingError` with
            the same text.
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
        raise TrainingError("", f"the first process failed: {told[1]}")
    result: T = told[0]
    return result
