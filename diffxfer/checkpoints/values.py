"""Elements as numpy arrays, for single elements and for errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def elements(data: memoryview, dtype: str) -> NDArray[np.generic]:
    """View bytes as elements in their stored form: a bfloat16 as its bits.

    Args:
        data: the bytes.
        dtype: as safetensors names it.
    """
    return np.frombuffer(data, _STORED[dtype])


def in_float64(stored: NDArray[np.generic], dtype: str) -> NDArray[np.float64]:
    """Convert elements to float64.

    Args:
        stored: elements from `elements`.
        dtype: as safetensors names it.
    """
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return stored.astype(np.float64)
