"""The memory that a probe needs for its models, and whether there is that much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.checkpoints.stored import BITS
from diffxfer.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from diffxfer.checkpoints.stored import StoredTensor

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
        parameters: the number of parameters of the largest model.
    """

    needed: int
    free: int
    dtype: torch.dtype | None
    parameters: int

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


def plan_memory(models: Sequence[Mapping[str, StoredTensor]], device: str) -> MemoryPlan:
    """Find out whether two models and a half fit, in float32 on a CPU if that fits too.

    Args:
        models: the tensors of each, as they are stored.
        device: where they will be.

    Raises:
        EvaluationError: if they do not fit.
    """
    import torch

    free = free_memory_on(device)
    parameters = max(sum(map(_elements, model.values())) for model in models)
    stored, single = int(MODELS * max(map(_stored_bytes, models))), int(MODELS * 4 * parameters)
    if torch.device(device).type == "cpu" and single <= free:
        return MemoryPlan(single, free, torch.float32, parameters)
    if stored > free:
        problem = (
            f"two models and a half need {gigabytes(stored)} of memory on {device}, and"
            f" {gigabytes(free)} are free"
        )
        remedy = "leave out --data, --tasks and --forward, since distances load no model"
        raise EvaluationError("probe", problem, remedy)
    return MemoryPlan(stored, free, None, parameters)


def _elements(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape)


def _stored_bytes(model: Mapping[str, StoredTensor]) -> int:
    return sum(_elements(tensor) * BITS[tensor.dtype] // 8 for tensor in model.values())


def free_memory_on(device: str) -> int:
    """The free memory of a device in bytes; for a CPU, at most what a container may still use.

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
