"""The operations, each in one pass over memory. Imported only by numba's compiler.

    D = finetuned − base
    R = target + D·alpha
    out = R rounded to its dtype

All steps are in float64, and each is rounded. A fused multiply-add would give other bits. LLVM
fuses only what is marked for it, and numba marks nothing.

A kernel that does more than sum has one loop per part, each over 256 elements at a time:
they stay in the L1 cache, and LLVM vectorises each loop. One loop for all of `subtract` took 151 µs
for 262,144 elements of bfloat16, three take 84.

Parameters are pointers to elements of the dtypes that a kernel is compiled for, and counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import (
    differs,
    first_bit,
    none,
    note,
    read,
    same,
    write,
)
from diffxfer.kernels.lanes import LANES, clear, total

TILE = 256


def transfer(
    finetuned: Any, base: Any, target: Any, out: Any, count: int, alpha: float
) -> np.int64:
    """Write target + α·(finetuned − base) to `out`; return 1 if any is not finite, else 0."""
    ours, theirs = carray(finetuned, count), carray(base, count)
    onto, made = carray(target, count), carray(out, count)
    found = none(out)
    for i in range(count):
        delta = read(ours[i]) - read(theirs[i])
        element = write(read(onto[i]) + delta * alpha, out)
        made[i] = element
        found = note(found, element)
    return first_bit(found)


def apply(diff: Any, target: Any, out: Any, count: int, alpha: float) -> np.int64:
    """Write target + α·Δ to `out`; return 1 if any is not finite, else 0."""
    delta, onto, made = carray(diff, count), carray(target, count), carray(out, count)
    found = none(out)
    for i in range(count):
        element = write(read(onto[i]) + read(delta[i]) * alpha, out)
        made[i] = element
        found = note(found, element)
    return first_bit(found)


def convert(source: Any, out: Any, count: int) -> np.int64:
    """Write the values in another dtype; return 1 if any is not finite, else 0."""
    values, made = carray(source, count), carray(out, count)
    found = none(out)
    for i in range(count):
        element = write(read(values[i]), out)
        made[i] = element
        found = note(found, element)
    return first_bit(found)


def check(source: Any, count: int) -> np.int64:
    """Return 1 if any is not finite, else 0."""
    values = carray(source, count)
    found = none(source)
    for i in range(count):
        found = note(found, values[i])
    return first_bit(found)


def subtract(
    finetuned: Any, base: Any, out: Any, count: int, scratch: Any, totals: Any
) -> np.int64:
    """Write finetuned − base to `out`, and measure it; return 1 if any is not finite, else 0.

    `totals` receives ‖Δ‖², ‖base‖², the number of unchanged elements, and the number of inexact
    elements: those that base + `out` does not give back bit for bit.
    """
    lanes, sums = carray(scratch, (2, LANES)), carray(totals, 4)
    ours, theirs, made = carray(finetuned, count), carray(base, count), carray(out, count)
    of_delta, of_base = lanes[0], lanes[1]
    clear(of_delta)
    clear(of_base)
    found, unchanged, inexact = none(out), 0, 0
    for start in range(0, count, LANES):
        f, b, o = ours[start:], theirs[start:], made[start:]
        kept, lost = np.uint32(0), np.uint32(0)
        size = min(LANES, count - start)
        for i in range(size):
            value = read(b[i])
            delta = read(f[i]) - value
            of_delta[i] += delta * delta
            of_base[i] += value * value
        for i in range(size):
            element = write(read(f[i]) - read(b[i]), out)
            o[i] = element
            found = note(found, element)
        for i in range(size):
            value = read(b[i])
            kept = np.uint32(kept + same(f[i], b[i], read(f[i]) - value))
            lost = np.uint32(lost + differs(write(value + read(o[i]), finetuned), f[i]))
        unchanged += np.int64(kept)
        inexact += np.int64(lost)
    sums[0], sums[1] = total(of_delta), total(of_base)
    sums[2], sums[3] = unchanged, inexact
    return first_bit(found)


def store(delta: Any, base: Any, out: Any, count: int, scratch: Any, totals: Any) -> np.int64:
    """Write Δ to `out`, and measure it as `subtract` does; return 1 if any is not finite, else 0.

    Finetuned is base + Δ, rounded to base's dtype.
    """
    lanes, sums = carray(scratch, (2, LANES)), carray(totals, 4)
    given, theirs, made = carray(delta, count), carray(base, count), carray(out, count)
    of_delta, of_base = lanes[0], lanes[1]
    clear(of_delta)
    clear(of_base)
    found, unchanged, inexact = none(out), 0, 0
    for start in range(0, count, LANES):
        d, b, o = given[start:], theirs[start:], made[start:]
        kept, lost = np.uint32(0), np.uint32(0)
        size = min(LANES, count - start)
        for i in range(size):
            value = read(b[i])
            of_delta[i] += read(d[i]) * read(d[i])
            of_base[i] += value * value
        for i in range(size):
            element = write(read(d[i]), out)
            o[i] = element
            found = note(found, element)
        for i in range(size):
            value = read(b[i])
            ours = write(value + read(d[i]), base)
            kept = np.uint32(kept + same(ours, b[i], read(d[i])))
            lost = np.uint32(lost + differs(write(value + read(o[i]), base), ours))
        unchanged += np.int64(kept)
        inexact += np.int64(lost)
    sums[0], sums[1] = total(of_delta), total(of_base)
    sums[2], sums[3] = unchanged, inexact
    return first_bit(found)


def contrast(left: Any, right: Any, count: int, scratch: Any, totals: Any) -> np.int64:
    """Count the equal elements of A and B; `totals` receives ‖B − A‖², ‖A‖² and ‖B‖²."""
    lanes, sums = carray(scratch, (3, LANES)), carray(totals, 4)
    ours, theirs = carray(left, count), carray(right, count)
    of_delta, of_left, of_right = lanes[0], lanes[1], lanes[2]
    clear(of_delta)
    clear(of_left)
    clear(of_right)
    unchanged = 0
    for start in range(0, count, LANES):
        a, b = ours[start:], theirs[start:]
        kept = np.uint32(0)
        size = min(LANES, count - start)
        for i in range(size):
            one, other = read(a[i]), read(b[i])
            delta = other - one
            of_delta[i] += delta * delta
            of_left[i] += one * one
            of_right[i] += other * other
        for i in range(size):
            kept = np.uint32(kept + same(a[i], b[i], read(b[i]) - read(a[i])))
        unchanged += np.int64(kept)
    sums[0], sums[1], sums[2] = total(of_delta), total(of_left), total(of_right)
    return np.int64(unchanged)


def restore(finetuned: Any, base: Any, diff: Any, count: int) -> np.int64:
    """Count the elements of finetuned that base + Δ does not give back bit for bit."""
    ours, theirs, delta = carray(finetuned, count), carray(base, count), carray(diff, count)
    inexact = 0
    for start in range(0, count, LANES):
        f, b, d = ours[start:], theirs[start:], delta[start:]
        lost = np.uint32(0)
        for i in range(min(LANES, count - start)):
            back = write(read(d[i]) + read(b[i]), finetuned)
            lost = np.uint32(lost + differs(back, f[i]))
        inexact += np.int64(lost)
    return np.int64(inexact)


def give_back(finetuned: Any, stored: Any, count: int) -> np.int64:
    """Count the elements of finetuned that change when converted to a dtype and back."""
    ours, kept = carray(finetuned, count), carray(stored, count)
    inexact = 0
    for start in range(0, count, LANES):
        f, k = ours[start:], kept[start:]
        lost = np.uint32(0)
        for i in range(min(LANES, count - start)):
            lost = np.uint32(lost + differs(write(read(k[i]), finetuned), f[i]))
        inexact += np.int64(lost)
    return np.int64(inexact)


def equal(left: Any, right: Any, count: int) -> np.int64:
    """Count the equal bytes."""
    ours, theirs = carray(left, count), carray(right, count)
    kept = 0
    for i in range(count):
        kept += np.int64(ours[i] == theirs[i])
    return np.int64(kept)


@njit(error_model="numpy")
def _add_products(left: Any, step: int, tile: Any, rank: int, out: Any) -> None:
    """Write the sum over the rank of left[k] · tile[k] to `out`; four at once, in their order."""
    size = len(out)
    value = read(left[0])
    for j in range(size):
        out[j] = value * tile[j]
    k = 1
    while k + 4 <= rank:
        a, b = read(left[k * step]), read(left[(k + 1) * step])
        c, d = read(left[(k + 2) * step]), read(left[(k + 3) * step])
        one, two = tile[k * TILE :], tile[(k + 1) * TILE :]
        three, four = tile[(k + 2) * TILE :], tile[(k + 3) * TILE :]
        for j in range(size):
            out[j] = (((out[j] + a * one[j]) + b * two[j]) + c * three[j]) + d * four[j]
        k += 4
    while k < rank:
        value, one = read(left[k * step]), tile[k * TILE :]
        for j in range(size):
            out[j] = out[j] + value * one[j]
        k += 1


def low_rank(
    left: Any,
    right: Any,
    out: Any,
    start: int,
    count: int,
    columns: int,
    rank: int,
    left_row: int,
    left_step: int,
    right_at: int,
    right_step: int,
    right_column: int,
    scaling: float,
    tiles: Any,
) -> np.int64:
    """Write scaling·(L·R) to `out`: elements of a matrix, from `start` on, in row-major order.

    Each element is summed over the rank in its order: (((l₀·r₀ + l₁·r₁) + l₂·r₂) + …)·scaling.

    L[i, k] is at ``i * left_row + k * left_step``, where row 0 is that of `start`. R[k, j] is at
    ``right_at + k * right_step + j * right_column``. `tiles` has room for rank × `TILE` elements:
    R is converted to float64 once per tile of columns, and used for every row.
    """
    made, tile = carray(out, count), carray(tiles, rank * TILE)
    first = start // columns
    stop = start + count
    rows = (stop + columns - 1) // columns - first
    lefts = carray(left, (rows - 1) * left_row + (rank - 1) * left_step + 1)
    last = right_at + (rank - 1) * right_step + (columns - 1) * right_column
    rights = carray(right, last + 1)
    for begin in range(0, columns, TILE):
        width = min(TILE, columns - begin)
        for k in range(rank):
            at = right_at + k * right_step + begin * right_column
            for j in range(width):
                tile[k * TILE + j] = read(rights[at + j * right_column])
        for row in range(rows):
            zero = (first + row) * columns + begin
            low, high = max(zero, start), min(zero + width, stop)
            if low < high:
                part = made[low - start : high - start]
                _add_products(lefts[row * left_row :], left_step, tile[low - zero :], rank, part)
                for j in range(high - low):
                    part[j] *= scaling
    return np.int64(0)
