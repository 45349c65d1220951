"""Narrowing differences, and splitting float32 into planes of bytes that compress well.

The planes of n elements are n exponents, in order; then three bytes of each element, sign and
mantissa from the highest to the lowest, all first bytes before all second ones. In these three
planes the elements are sorted by exponent, and those of one exponent stay in order.

Imported only by numba's compiler. `places` has room for 256 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from diffxfer.kernels.dtypes import bits_of_float, differs, read, write


def narrow(values: Any, out: Any, count: int) -> np.int64:
    """Round float64 to float32; return 1 if a value changes, plus 2 if one is no bfloat16."""
    given, made = carray(values, count), carray(out, count)
    changed, low = np.uint32(0), np.uint32(0)
    for i in range(count):
        value = given[i]
        single = np.float32(value)
        made[i] = single
        # By bits, so that a NaN keeps its payload.
        other = bits_of_float(np.float64(single)) != bits_of_float(value)
        changed = np.uint32(changed | np.uint32(other))
        low = np.uint32(low | (bits_of_float(single) & np.uint32(0xFFFF)))
    return np.int64(changed) + np.int64(2 if low else 0)


def lost(finetuned: Any, base: Any, diff: Any, marks: Any, count: int) -> np.int64:
    """Mark by 1 the elements of finetuned that base + Δ does not give back; return their number."""
    ours, theirs, delta = carray(finetuned, count), carray(base, count), carray(diff, count)
    made = carray(marks, count)
    found = np.int64(0)
    for i in range(count):
        is_lost = differs(write(read(theirs[i]) + read(delta[i]), finetuned), ours[i])
        made[i] = np.uint8(is_lost)
        found += np.int64(is_lost)
    return found


def split(elements: Any, planes: Any, places: Any, count: int) -> np.int64:
    """Split the bits of float32; afterwards `places` has the end of each exponent's elements."""
    given, ends = carray(elements, count), carray(places, 256)
    exponents, made = carray(planes, count), carray(planes, 4 * count)
    for k in range(256):
        ends[k] = np.uint32(0)
    for i in range(count):
        exponent = (given[i] >> np.uint32(23)) & np.uint32(255)
        exponents[i] = np.uint8(exponent)
        ends[exponent] += np.uint32(1)
    start = np.uint32(0)
    for k in range(256):
        found = ends[k]
        ends[k] = start
        start = np.uint32(start + found)
    for i in range(count):
        whole = given[i]
        rest = ((whole >> np.uint32(31)) << np.uint32(23)) | (whole & np.uint32(0x7FFFFF))
        place = ends[exponents[i]]
        ends[exponents[i]] = np.uint32(place + np.uint32(1))
        made[count + place] = np.uint8(rest >> np.uint32(16))
        made[2 * count + place] = np.uint8((rest >> np.uint32(8)) & np.uint32(255))
        made[3 * count + place] = np.uint8(rest & np.uint32(255))
    return np.int64(0)


def join(planes: Any, places: Any, elements: Any, count: int) -> np.int64:
    """Put the bits of float32 together again; any planes are safe to join."""
    given, starts = carray(planes, 4 * count), carray(places, 256)
    made = carray(elements, count)
    for k in range(256):
        starts[k] = np.uint32(0)
    for i in range(count):
        starts[given[i]] += np.uint32(1)
    start = np.uint32(0)
    for k in range(256):
        found = starts[k]
        starts[k] = start
        start = np.uint32(start + found)
    for i in range(count):
        exponent = np.uint32(given[i])
        place = starts[exponent]
        starts[exponent] = np.uint32(place + np.uint32(1))
        rest = (
            (np.uint32(given[count + place]) << np.uint32(16))
            | (np.uint32(given[2 * count + place]) << np.uint32(8))
            | np.uint32(given[3 * count + place])
        )
        sign = (rest >> np.uint32(23)) << np.uint32(31)
        made[i] = sign | (exponent << np.uint32(23)) | (rest & np.uint32(0x7FFFFF))
    return np.int64(0)
