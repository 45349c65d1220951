"""Opening the device of a run. Importing this module does not import torch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.streaming.pipeline import Accelerator
    from diffxfer.streaming.plan import Plan


@contextmanager
def open_accelerator(
    device: str, plan: Plan, threads: int, memory_bytes: int
) -> Iterator[Accelerator | None]:
    """Open the accelerator of a run; on exit, waits for its work and closes it.

    Args:
        device: ``"cpu"`` or a GPU.
        plan: the plan.
        threads: number of workers.
        memory_bytes: the most bytes to allocate on a GPU.

    Yields:
        The accelerator, or None for the CPU.
    """
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
