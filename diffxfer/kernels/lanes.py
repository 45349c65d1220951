"""Sums whose bits do not depend on the processor. Imported only by numba's compiler.

Sums have 256 lanes: element i is added to lane i mod 256, and the lanes are added by halves at the
end. So the vector width of a processor does not change their bits, and lanes do not wait for each
other.
"""

from __future__ import annotations

from typing import Any

from numba import njit

LANES = 256


@njit(error_model="numpy")
def clear(lanes: Any) -> None:
    """Set all lanes to zero."""
    for i in range(LANES):
        lanes[i] = 0.0


@njit(error_model="numpy")
def total(lanes: Any) -> float:
    """The sum of all lanes, which are overwritten."""
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]
