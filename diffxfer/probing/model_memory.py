"""The memory that a probe needs for its models, and whether there is that much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.checkpoints.stored import BITS
from diffxfer.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from diffxfer.models.source import ModelSource

MODELS = 2.5
"""Two models are in memory at once, and half of one for what is computed from them."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory for the models of a probe.

    Attributes:
        needed: the bytes of two models and a half.
        free: the bytes that are free on the device.
        dtype: the dtype in which models compute; None for that of their weights.
    """

    needed: int
    free: int
    dtype: torch.dtype | None

    def sentence(self, device: str) -> str:
        """What is needed and what is free, in words.

        Args:
            device: where the models will be.
        """
        kind = "the weights' dtype" if self.dtype is None else "float32"
        return (
            f"models in {kind} on {device}: up to {gigabytes(self.needed)} of memory;"
            f" {gigabytes(self.free)} are free"
        )


def plan_memory(sources: Iterable[ModelSource], device: str) -> MemoryPlan:
    """Find out whether two models and a half fit, in float32 on a CPU if that fits too.

    Args:
        sources: the models.
        device: where they will be.

    Raises:
        EvaluationError: if they do not fit.
    """
    import torch

    free = free_memory_on(device)
    sizes = [_sizes(source) for source in sources]
    stored, single = (int(MODELS * max(size[at] for size in sizes)) for at in (0, 1))
    if torch.device(device).type == "cpu" and single <= free:
        return MemoryPlan(single, free, torch.float32)
    if stored > free:
        problem = (
            f"two models and a half need {gigabytes(stored)} of memory on {device}, and"
            f" {gigabytes(free)} are free"
        )
        remedy = "leave out --data, --tasks and --forward: distances need no model in memory"
        raise EvaluationError("probe", problem, remedy)
    return MemoryPlan(stored, free, None)


def _sizes(source: ModelSource) -> tuple[int, int]:
    """The bytes of a model as it is stored, and in float32."""
    stored = single = 0
    for name in source.names():
        elements = 1
        for length in source.shape(name):
            elements *= length
        stored += elements * BITS[source.dtype(name)] // 8
        single += elements * 4
    return stored, single


def free_memory_on(device: str) -> int:
    """The free memory of a device in bytes; for a CPU, less what a container may use.

    Args:
        device: as PyTorch names it.
    """
    import psutil
    import torch

    kind = torch.device(device)
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
