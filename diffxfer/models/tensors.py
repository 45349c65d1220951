"""Bytes as they are on disk, and torch tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch
    from numpy.typing import NDArray

_TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def torch_dtype(dtype: str) -> torch.dtype | None:
    """The dtype of torch; None if torch has none.

    Args:
        dtype: as safetensors names it.
    """
    import torch

    return getattr(torch, _TORCH_NAMES.get(dtype, ""), None)


def as_tensor(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that shares the memory of its bytes.

    Args:
        data: the bytes.
        dtype: as safetensors names it; one that torch has.
        shape: the shape.
    """
    import torch

    found = torch_dtype(dtype)
    assert found is not None
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=found)
    return torch.from_numpy(data).view(found).reshape(shape)
