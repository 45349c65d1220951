"""Kernels called with tensors, and PyTorch's own arithmetic as the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from diffxfer.kernels.native import kernel
from diffxfer.kernels.signatures import SCRATCH, TOTALS
from tests.helpers import DTYPES, to_bits

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
EVERY = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
"""Every pattern of 16 bits: all numbers, both zeros, subnormals, infinities and NaN."""


def call(name: str, *tensors: Tensor, alpha: float | None = None) -> int:
    """Run a kernel over whole tensors."""
    dtypes = tuple(NAMES[tensor.dtype] for tensor in tensors)
    scale = () if alpha is None else (alpha,)
    addresses = [tensor.data_ptr() for tensor in tensors]
    return kernel(name, dtypes)(*addresses, tensors[0].numel(), *scale)


def call_with_sums(name: str, *tensors: Tensor, count: int = 4) -> tuple[int, list[float]]:
    """Run a kernel that has that many sums."""
    scratch, totals = np.full(SCRATCH, np.nan), np.full(TOTALS, np.nan)
    dtypes = tuple(NAMES[tensor.dtype] for tensor in tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    arrays = scratch.ctypes.data, totals.ctypes.data
    found = kernel(name, dtypes)(*addresses, tensors[0].numel(), *arrays)
    assert np.isnan(totals[count:]).all()
    return found, totals[:count].tolist()


def transfer(ours: Tensor, theirs: Tensor, onto: Tensor, alpha: float, out: torch.dtype) -> Tensor:
    delta = ours.double() - theirs.double()
    return (onto.double() + delta * alpha).to(out)


def apply(delta: Tensor, onto: Tensor, alpha: float, out: torch.dtype) -> Tensor:
    return (onto.double() + delta.double() * alpha).to(out)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit; NaN is NaN, whatever its payload."""
    both = found.isnan() & expected.isnan()
    return bool(((to_bits(found) == to_bits(expected)) | both.reshape(-1)).all())


def finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def any_bits(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Random bits: numbers of every size, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator)
    return data.to(torch.uint8).view(dtype)
