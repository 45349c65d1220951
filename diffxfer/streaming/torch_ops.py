"""The arithmetic, with torch's float64 semantics.

    D = finetuned.double() − base.double()
    R = target.double() + D·alpha
    out = R.to(dtype)

Every step is a separate call: `torch.add(…, alpha=…)` and fused kernels round the product and the
sum only once and give other bits. Inputs are converted by `copy_`, which is exact. All tensors are
one-dimensional and of the same length; results are written to buffers that are reused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def subtract(finetuned: Tensor, base: Tensor, delta: Tensor, base64: Tensor) -> None:
    """D = finetuned − base.

    Args:
        finetuned: shape `(n,)`, any float dtype.
        base: shape `(n,)`, any float dtype.
        delta: float64, receives D.
        base64: float64, receives base.
    """
    delta.copy_(finetuned)
    base64.copy_(base)
    delta.sub_(base64)


def add_scaled(target: Tensor, delta: Tensor, alpha: float, total: Tensor) -> None:
    """R = target + D·alpha.

    Args:
        target: shape `(n,)`, any float dtype.
        delta: float64 D, overwritten.
        alpha: the scale.
        total: float64, receives R.
    """
    if alpha != 1.0:  # multiplying by one changes no bit
        delta.mul_(alpha)
    total.copy_(target)
    total.add_(delta)


def compute(
    operation: Operation,
    inputs: Sequence[Tensor],
    alpha: float,
    delta: Tensor,
    total: Tensor,
    out: Tensor,
) -> None:
    """The arithmetic of an operation, on any device.

    Args:
        operation: TRANSFER, APPLY or SUBTRACT.
        inputs: as the operation names them, any float dtypes.
        alpha: the scale of Δ.
        delta: float64; holds D after SUBTRACT, otherwise overwritten.
        total: float64; holds base after SUBTRACT, otherwise overwritten.
        out: receives the result, any float dtype.
    """
    if operation is Operation.SUBTRACT:
        subtract(inputs[0], inputs[1], delta, total)
        out.copy_(delta)
        return
    if operation is Operation.TRANSFER:
        subtract(inputs[0], inputs[1], delta, total)
    else:
        delta.copy_(inputs[0])
    add_scaled(inputs[-1], delta, alpha, total)
    out.copy_(total)


def bits(values: Tensor) -> Tensor:
    """The elements' bits as integers, to compare them bit for bit."""
    return values.view(_INTEGERS[values.element_size()])
