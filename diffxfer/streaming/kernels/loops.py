"""The operations, each one pass over memory. Imported by numba's compiler alone.

    D = finetuned − base
    R = target + D·alpha
    out = R rounded to its dtype

In float64, every step rounded by itself: a product and a sum that are contracted into one rounding
give other bits. LLVM contracts nothing that is not marked for it, and numba marks nothing.

Sums have 256 lanes: element i is added to lane i mod 256, and the lanes are added by halves at the
end. So they have the same bits whatever a processor computes at once, and lanes do not wait for
each other.

Parameters are pointers, of the dtypes that a kernel is compiled for, and numbers of elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.streaming.kernels.encodings import bits, not_finite, read, same, write

LANES = 256


def transfer(
    finetuned: Any, base: Any, target: Any, out: Any, count: int, alpha: float
) -> np.int64:
    """Out = target + α·(finetuned − base); 1 if something in it is not finite, else 0."""
    ours, theirs = carray(finetuned, count), carray(base, count)
    onto, made = carray(target, count), carray(out, count)
    found = np.uint32(0)
    for i in range(count):
        delta = read(ours[i]) - read(theirs[i])
        made[i] = write(read(onto[i]) + delta * alpha, made[i])
        found |= not_finite(made[i])
    return np.int64(found)


def apply(diff: Any, target: Any, out: Any, count: int, alpha: float) -> np.int64:
    """Out = target + α·Δ; 1 if something in it is not finite, else 0."""
    delta, onto, made = carray(diff, count), carray(target, count), carray(out, count)
    found = np.uint32(0)
    for i in range(count):
        made[i] = write(read(onto[i]) + read(delta[i]) * alpha, made[i])
        found |= not_finite(made[i])
    return np.int64(found)


def convert(source: Any, out: Any, count: int) -> np.int64:
    """The same values in another dtype; 1 if something in it is not finite, else 0."""
    values, made = carray(source, count), carray(out, count)
    found = np.uint32(0)
    for i in range(count):
        made[i] = write(read(values[i]), made[i])
        found |= not_finite(made[i])
    return np.int64(found)


def check(source: Any, count: int) -> np.int64:
    """1 if something is not finite, else 0."""
    values = carray(source, count)
    found = np.uint32(0)
    for i in range(count):
        found |= not_finite(values[i])
    return np.int64(found)


@njit(error_model="numpy")
def _clear(lanes: Any) -> None:
    for i in range(LANES):
        lanes[i] = 0.0


@njit(error_model="numpy")
def _total(lanes: Any) -> float:
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    total: float = lanes[0]
    return total


def subtract(
    finetuned: Any, base: Any, out: Any, count: int, scratch: Any, totals: Any
) -> np.int64:
    """Out = finetuned − base, and what is to be known of it.

    `totals` receives ‖Δ‖², ‖base‖², and how many elements are unchanged, and inexact: those that
    base + out does not give back bit for bit. 1 if something in `out` is not finite, else 0.
    """
    lanes, sums = carray(scratch, (2, LANES)), carray(totals, 4)
    ours, theirs, made = carray(finetuned, count), carray(base, count), carray(out, count)
    of_delta, of_base = lanes[0], lanes[1]
    _clear(of_delta)
    _clear(of_base)
    found, unchanged, inexact = np.uint32(0), 0, 0
    for start in range(0, count, LANES):
        f, b, o = ours[start:], theirs[start:], made[start:]
        kept, lost = np.uint32(0), np.uint32(0)
        for i in range(min(LANES, count - start)):
            old = read(b[i])
            delta = read(f[i]) - old
            of_delta[i] += delta * delta
            of_base[i] += old * old
            o[i] = write(delta, o[i])
            found |= not_finite(o[i])
            kept += np.uint32(same(f[i], b[i], delta))
            lost += np.uint32(bits(write(read(o[i]) + old, f[i])) != bits(f[i]))
        unchanged += np.int64(kept)
        inexact += np.int64(lost)
    sums[0], sums[1] = _total(of_delta), _total(of_base)
    sums[2], sums[3] = unchanged, inexact
    return np.int64(found)


def contrast(left: Any, right: Any, count: int, scratch: Any, totals: Any) -> np.int64:
    """How much B differs from A; `totals` receives ‖B − A‖², ‖A‖², ‖B‖². How many are the same."""
    lanes, sums = carray(scratch, (3, LANES)), carray(totals, 4)
    ours, theirs = carray(left, count), carray(right, count)
    of_delta, of_left, of_right = lanes[0], lanes[1], lanes[2]
    _clear(of_delta)
    _clear(of_left)
    _clear(of_right)
    unchanged = 0
    for start in range(0, count, LANES):
        a, b = ours[start:], theirs[start:]
        kept = np.uint32(0)
        for i in range(min(LANES, count - start)):
            one, other = read(a[i]), read(b[i])
            delta = other - one
            of_delta[i] += delta * delta
            of_left[i] += one * one
            of_right[i] += other * other
            kept += np.uint32(same(a[i], b[i], delta))
        unchanged += np.int64(kept)
    sums[0], sums[1], sums[2] = _total(of_delta), _total(of_left), _total(of_right)
    return np.int64(unchanged)


def restore(finetuned: Any, base: Any, diff: Any, count: int) -> np.int64:
    """How many elements of finetuned base + Δ does not give back bit for bit."""
    ours, theirs, delta = carray(finetuned, count), carray(base, count), carray(diff, count)
    inexact = 0
    for start in range(0, count, LANES):
        f, b, d = ours[start:], theirs[start:], delta[start:]
        lost = np.uint32(0)
        for i in range(min(LANES, count - start)):
            lost += np.uint32(bits(write(read(d[i]) + read(b[i]), f[i])) != bits(f[i]))
        inexact += np.int64(lost)
    return np.int64(inexact)


def give_back(finetuned: Any, stored: Any, count: int) -> np.int64:
    """How many elements of finetuned are not the same once converted to a dtype and back."""
    ours, kept = carray(finetuned, count), carray(stored, count)
    inexact = 0
    for start in range(0, count, LANES):
        f, k = ours[start:], kept[start:]
        lost = np.uint32(0)
        for i in range(min(LANES, count - start)):
            lost += np.uint32(bits(write(read(k[i]), f[i])) != bits(f[i]))
        inexact += np.int64(lost)
    return np.int64(inexact)


def equal(left: Any, right: Any, count: int) -> np.int64:
    """How many bytes are the same."""
    ours, theirs = carray(left, count), carray(right, count)
    kept = 0
    for i in range(count):
        kept += np.int64(ours[i] == theirs[i])
    return np.int64(kept)
