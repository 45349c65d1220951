"""Lengths and angles of the steps between models, in one pass. Imported only by numba's compiler.

As in `loops`, there is one loop per part, each over 256 elements at a time, which stay in the L1
cache. The steps are kept there in float64, so that they are computed once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import read, same
from diffxfer.kernels.lanes import LANES, clear, total


@njit(error_model="numpy")
def _add_squares(values: Any, size: int, lanes: Any) -> None:
    for i in range(size):
        value = read(values[i])
        lanes[i] += value * value


@njit(error_model="numpy")
def _add_steps(to: Any, origin: Any, size: int, steps: Any, lanes: Any) -> None:
    """Write to − origin to `steps`, and add its squares to `lanes`."""
    for i in range(size):
        step = read(to[i]) - read(origin[i])
        steps[i] = step
        lanes[i] += step * step


@njit(error_model="numpy")
def _add_products_of(left: Any, right: Any, size: int, lanes: Any) -> None:
    for i in range(size):
        lanes[i] += left[i] * right[i]


@njit(error_model="numpy")
def _count_same(left: Any, right: Any, steps: Any, size: int) -> np.int64:
    found = np.uint32(0)
    for i in range(size):
        found = np.uint32(found + same(left[i], right[i], steps[i]))
    return np.int64(found)


@njit(error_model="numpy")
def _count_both(left: Any, right: Any, size: int) -> np.int64:
    """The number of places where neither is zero."""
    found = np.uint32(0)
    for i in range(size):
        found = np.uint32(found + (np.uint32(left[i] != 0.0) & np.uint32(right[i] != 0.0)))
    return np.int64(found)


@njit(error_model="numpy")
def _count_agreeing(left: Any, right: Any, size: int) -> np.int64:
    """The number of places where both are positive, or both are negative."""
    found = np.uint32(0)
    for i in range(size):
        up = np.uint32(left[i] > 0.0) & np.uint32(right[i] > 0.0)
        down = np.uint32(left[i] < 0.0) & np.uint32(right[i] < 0.0)
        found = np.uint32(found + (up | down))
    return np.int64(found)


def distances(
    finetuned: Any, base: Any, target: Any, count: int, scratch: Any, totals: Any
) -> np.int64:
    """Measure the steps Δ = finetuned − base and M = target − base; returns 0.

    `totals` receives ‖finetuned‖², ‖base‖², ‖target‖², ‖Δ‖², ‖M‖² and Δ·M, then numbers of
    elements: finetuned = base, target = base, neither Δ nor M is 0, Δ and M have the same sign.
    """
    lanes, sums = carray(scratch, (8, LANES)), carray(totals, 10)
    ours, theirs, onto = carray(finetuned, count), carray(base, count), carray(target, count)
    for k in range(6):
        clear(lanes[k])
    delta, move = lanes[6], lanes[7]
    same_ours, same_onto, both, agreeing = 0, 0, 0, 0
    for start in range(0, count, LANES):
        f, b, t = ours[start:], theirs[start:], onto[start:]
        size = min(LANES, count - start)
        _add_squares(f, size, lanes[0])
        _add_squares(b, size, lanes[1])
        _add_squares(t, size, lanes[2])
        _add_steps(f, b, size, delta, lanes[3])
        _add_steps(t, b, size, move, lanes[4])
        _add_products_of(delta, move, size, lanes[5])
        same_ours += _count_same(f, b, delta, size)
        same_onto += _count_same(t, b, move, size)
        both += _count_both(delta, move, size)
        agreeing += _count_agreeing(delta, move, size)
    for k in range(6):
        sums[k] = total(lanes[k])
    sums[6], sums[7], sums[8], sums[9] = same_ours, same_onto, both, agreeing
    return np.int64(0)


def gains(
    finetuned: Any, base: Any, target: Any, direct: Any, count: int, scratch: Any, totals: Any
) -> np.int64:
    """Measure the steps Δ = finetuned − base and G = direct − target; returns 0.

    `totals` receives ‖direct‖², ‖Δ‖², ‖G‖² and Δ·G, then numbers of elements: direct = target,
    neither Δ nor G is 0, Δ and G have the same sign.
    """
    lanes, sums = carray(scratch, (6, LANES)), carray(totals, 7)
    ours, theirs = carray(finetuned, count), carray(base, count)
    onto, other = carray(target, count), carray(direct, count)
    for k in range(4):
        clear(lanes[k])
    delta, gain = lanes[4], lanes[5]
    unchanged, both, agreeing = 0, 0, 0
    for start in range(0, count, LANES):
        f, b, t, d = ours[start:], theirs[start:], onto[start:], other[start:]
        size = min(LANES, count - start)
        _add_squares(d, size, lanes[0])
        _add_steps(f, b, size, delta, lanes[1])
        _add_steps(d, t, size, gain, lanes[2])
        _add_products_of(delta, gain, size, lanes[3])
        unchanged += _count_same(d, t, gain, size)
        both += _count_both(delta, gain, size)
        agreeing += _count_agreeing(delta, gain, size)
    for k in range(4):
        sums[k] = total(lanes[k])
    sums[4], sums[5], sums[6] = unchanged, both, agreeing
    return np.int64(0)
