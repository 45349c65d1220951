"""The device of the arithmetic: checking the option, and choosing a device.

Importing this does not import torch; torch is imported only if a GPU is requested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import short
from diffxfer.errors import OptionError
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.streaming.plan import Plan

MEMORY_BYTES = 512_000_000
"""The default for the most bytes that a run allocates on a GPU."""

_FORM = re.compile(r"cpu|auto|cuda(?::([0-9]{1,4}))?")
_BLOCK_US: Mapping[Operation, int] = {
    Operation.SUBTRACT: 110,
    Operation.TRANSFER: 90,
    Operation.APPLY: 60,
}
"""Time per block of bfloat16 on one core of an AMD EPYC, in microseconds."""
_GPU_START_S = 5
"""A rough time for CUDA to start and to pin memory. Not measured: no GPU was available."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The device of a plan's arithmetic.

    Attributes:
        device: ``"cpu"`` or a GPU such as ``"cuda:0"``.
        why: why it was chosen, for ``"auto"``; otherwise empty.
    """

    device: str
    why: str = ""


def check_device(device: str) -> None:
    """Refuse an unknown or missing device; imports torch only for a GPU.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"auto"``.

    Raises:
        OptionError: if it has another form, or there is no such GPU.
    """
    form = _FORM.fullmatch(device)
    if form is None:
        problem = f"{short(device)} is unknown"
        raise OptionError("--device", problem, "give cpu, cuda, cuda:N or auto")
    if device in ("cpu", "auto"):
        return
    found = _gpus()
    if not found:
        import torch

        problem = (
            f"{device} needs a GPU that PyTorch can use; PyTorch {torch.__version__} finds none"
        )
        remedy = "give cpu or auto; or check nvidia-smi, and that PyTorch is a build with CUDA"
        raise OptionError("--device", problem, remedy)
    if int(form[1] or 0) >= found:
        there = "1 GPU, cuda:0" if found == 1 else f"{found} GPUs, cuda:0 to cuda:{found - 1}"
        problem = f"{device} does not exist: PyTorch finds {there}"
        raise OptionError("--device", problem, "give one of these, cpu or auto")


def choose_device(device: str, plan: Plan, threads: int) -> Choice:
    """Choose the device of a plan's arithmetic.

    A GPU can save only the arithmetic: the same threads read and write the files, and every byte
    crosses a bus too. So if the threads need less time for the arithmetic than a GPU needs to
    start, the CPU is as fast. When reading from a disk, the CPU is as fast for larger models too,
    since reading, computing and writing overlap; but whether files are cached is not known.

    Args:
        device: the requested device, checked.
        plan: the plan.
        threads: number of workers.
    """
    if device != "auto":
        form = _FORM.fullmatch(device)
        assert form is not None
        return Choice(device if device == "cpu" else f"cuda:{int(form[1] or 0)}")
    if not _gpus():
        return Choice("cpu", "PyTorch finds no GPU")
    work_us = sum(
        task.elements * _BLOCK_US.get(task.operation, 0) / BLOCK_ELEMENTS for task in plan.tasks
    )
    seconds = work_us / threads / 1e6
    takes = f"the arithmetic takes about {seconds:.1f} s at --threads {threads}"
    if seconds < _GPU_START_S:
        return Choice("cpu", f"{takes}, a GPU about {_GPU_START_S} s to start")
    return Choice("cuda:0", f"{takes}, more than a GPU's start")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
