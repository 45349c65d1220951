"""Rounding to codes of a few bits, and how far what is rounded is from the difference.

A code is an integer from −`most` to `most`, plus `most` + 1; its value is the integer times the
scale of its row, a bfloat16. This product is exact in float32. `first` is the place of the first
element in its row.

Imported only by numba's compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import read, write
from diffxfer.kernels.lanes import LANES, clear, total


@njit(error_model="numpy")
def _integer(value: Any, inverse: Any, most: Any) -> Any:
    """The integer nearest to value · inverse, a tie to the even one, within ±most."""
    return min(max(np.rint(value * inverse), -most), most)


@njit(error_model="numpy")
def _squared_error(part: Any, scale: Any, most: Any, lanes: Any) -> Any:
    """‖values of the codes − values‖²."""
    inverse = 1.0 / scale
    clear(lanes)
    for start in range(0, len(part), LANES):
        given = part[start:]
        for i in range(min(LANES, len(part) - start)):
            error = _integer(given[i], inverse, most) * scale - given[i]
            lanes[i] += error * error
    return total(lanes)


@njit(error_model="numpy")
def _largest(part: Any) -> Any:
    """The largest magnitude; infinity if one is NaN or from 2¹²⁷ on."""
    largest, odd = 0.0, np.uint32(0)
    for i in range(len(part)):
        size = abs(part[i])
        odd = np.uint32(odd | np.uint32(not size < 2.0**127))
        largest = max(largest, size)
    return np.inf if odd else largest


@njit(error_model="numpy")
def _best_scale(part: Any, scales: Any, most: Any, steps: Any, lanes: Any) -> Any:
    """The scale with the least squared error: (1 − k/16) · largest / most, the first one of equals.

    Small codes lose more by the steps of many elements than by cutting off a few.
    """
    largest = _largest(part)
    if largest == np.inf:
        return largest
    best = read(write(largest / most, scales))
    if steps == 1 or best == 0.0:
        return best
    least = _squared_error(part, best, most, lanes)
    for k in range(1, steps):
        scale = read(write(largest * (1.0 - k / 16.0) / most, scales))
        if scale == 0.0:
            break
        error = _squared_error(part, scale, most, lanes)
        if error < least:
            least, best = error, scale
    return best


def quantise(
    values: Any,
    scales: Any,
    codes: Any,
    rounded: Any,
    lanes: Any,
    count: int,
    first: int,
    width: int,
    most: int,
    steps: int,
) -> np.int64:
    """Round float64 to codes of a byte each, with one of `steps` scales for each row.

    Returns 1 if a value is NaN, infinite or too large for that, and nothing of use is written then.
    """
    given, made, back = carray(values, count), carray(codes, count), carray(rounded, count)
    factors, sums = carray(scales, (first + count + width - 1) // width), carray(lanes, LANES)
    limit, start, row = np.float64(most), 0, 0
    while start < count:
        stop = min((row + 1) * width - first, count)
        part, target, near = given[start:stop], made[start:stop], back[start:stop]
        scale = _best_scale(part, scales, limit, steps, sums)
        if scale == np.inf:
            return np.int64(1)
        factors[row] = write(scale, scales)
        inverse = 1.0 / scale if scale else 0.0
        for i in range(stop - start):
            code = np.int32(_integer(part[i], inverse, limit))
            target[i] = np.uint8(code + np.int32(most) + np.int32(1))
            near[i] = np.float64(code) * scale
        start = stop
        row += 1
    return np.int64(0)


def dequantise(
    codes: Any, scales: Any, out: Any, count: int, first: int, width: int, most: int
) -> np.int64:
    """The values of codes of a byte each, in float32; any codes and scales are safe."""
    given, made = carray(codes, count), carray(out, count)
    factors = carray(scales, (first + count + width - 1) // width)
    zero, start, row = np.float32(most + 1), 0, 0
    while start < count:
        stop = min((row + 1) * width - first, count)
        part, target = given[start:stop], made[start:stop]
        scale = np.float32(read(factors[row]))
        for i in range(stop - start):
            target[i] = (np.float32(part[i]) - zero) * scale
        start = stop
        row += 1
    return np.int64(0)


def stray(finetuned: Any, base: Any, diff: Any, count: int, lanes: Any, totals: Any) -> np.int64:
    """Sum the squares of Δ − (finetuned − base), and those of finetuned − base."""
    ours, theirs, stored = carray(finetuned, count), carray(base, count), carray(diff, count)
    errors, squares = carray(lanes, LANES), carray(lanes, 2 * LANES)[LANES:]
    clear(errors)
    clear(squares)
    for start in range(0, count, LANES):
        f, b, d = ours[start:], theirs[start:], stored[start:]
        for i in range(min(LANES, count - start)):
            whole = read(f[i]) - read(b[i])
            error = read(d[i]) - whole
            errors[i] += error * error
            squares[i] += whole * whole
    found = carray(totals, 2)
    found[0] = total(errors)
    found[1] = total(squares)
    return np.int64(0)
