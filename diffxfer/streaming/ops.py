"""The arithmetic, in torch's float64 semantics and nothing else.

    D = finetuned.double() − base.double()
    R = target.double() + D·alpha
    out = R.to(dtype)

Every step is a separate call: `torch.add(…, alpha=…)` and fused kernels contract the product and
the sum into one rounding and give other bits. Inputs are converted by `copy_`, which is exact.
All tensors are one-dimensional and of the same length; results land in buffers that are reused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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
    if alpha != 1.0:  # a product with one changes no bit
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
    """An operation's arithmetic, from its inputs to the output, on any device.

    Args:
        operation: TRANSFER, APPLY or SUBTRACT.
        inputs: as the operation names them, any float dtypes.
        alpha: the scale of Δ.
        delta: float64, left as D where the operation is SUBTRACT, otherwise overwritten.
        total: float64, left as base where the operation is SUBTRACT, otherwise overwritten.
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


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A sum is several times faster than `isfinite().all()`, and cannot be finite if a value is not.
    It can overflow by itself, so only a suspicious sum is followed by the search.
    """
    # float16's own sum overflows at once; bfloat16's takes half the time of one in float32.
    # `math.isfinite` of the item, because torch's of a scalar takes longer than the sum.
    wide = {torch.float16: torch.float32, torch.float32: torch.float64}.get(values.dtype)
    if math.isfinite(values.sum(dtype=wide).item()):
        return True
    return bool(torch.isfinite(values).all())


def first(flags: Tensor) -> int | None:
    """The index of the first true element, None if there is none."""
    found = flags.nonzero()
    return int(found[0]) if len(found) else None


def squared_norm(values: Tensor) -> float:
    """The sum of the squares of a float64 tensor."""
    return float(torch.dot(values, values))


def different(left: Tensor, right: Tensor, difference: Tensor) -> NDArray[np.bool_]:
    """Which elements of two tensors differ: in any bit, or by value in unlike dtypes.

    Args:
        left: shape `(n,)`, on the CPU.
        right: shape `(n,)`, on the CPU.
        difference: float64, left − right.
    """
    if left.dtype != right.dtype:
        changed: NDArray[np.bool_] = difference.numpy() != 0
        return changed
    return different_bits(left, right)


def count_same(left: Tensor, right: Tensor, difference: Tensor) -> int:
    """How many elements of two tensors are the same; the arguments are those of `different`."""
    return len(left) - int(np.count_nonzero(different(left, right, difference)))


def different_bits(left: Tensor, right: Tensor) -> NDArray[np.bool_]:
    """Which elements of two tensors of one dtype differ in any bit, like 0.0 and −0.0."""
    # numpy compares and counts in a third of torch's time.
    different: NDArray[np.bool_] = bits(left).numpy() != bits(right).numpy()
    return different


def bits(values: Tensor) -> Tensor:
    """The same elements as integers, which differ wherever a bit does."""
    return values.view(_INTEGERS[values.element_size()])
