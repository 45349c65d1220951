"""Quantising float32 values: extremes of blocks, and codes of a byte each.

Imported only by numba's compiler.

The arguments that describe blocks are those of `decoding`. Every step is in float32, and rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.decoding import scale_row
from diffxfer.kernels.dtypes import bits_of_float, float_of_bits


@njit(error_model="numpy")
def _to_e4m3(value: Any) -> Any:
    """Round to float8 E4M3, a tie to the even one; beyond 448, the nearest is 448."""
    whole = bits_of_float(value)
    sign = (whole >> np.uint32(24)) & np.uint32(0x80)
    magnitude = whole & np.uint32(0x7FFFFFFF)
    odd = (magnitude >> np.uint32(20)) & np.uint32(1)
    rounded = (magnitude + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
    code = np.uint32(min(np.int64(rounded) - np.int64(120 << 3), np.int64(0x7E)))
    small = np.uint32(np.rint(abs(value) * np.float32(512.0)))
    # Below 2⁻⁶ all steps are 2⁻⁹.
    code = small if magnitude < np.uint32(0x3C800000) else code
    return np.uint8(code | sign)


@njit(error_model="numpy")
def _to_e2m1(value: Any) -> Any:
    """Round to a float of 4 bits, a tie to the one with an even last bit."""
    size = abs(value)
    code = np.uint32(0)
    code += np.uint32(size > np.float32(0.25))
    code += np.uint32(size >= np.float32(0.75))
    code += np.uint32(size > np.float32(1.25))
    code += np.uint32(size >= np.float32(1.75))
    code += np.uint32(size > np.float32(2.5))
    code += np.uint32(size >= np.float32(3.5))
    code += np.uint32(size > np.float32(5.0))
    sign = (bits_of_float(value) >> np.uint32(28)) & np.uint32(8)
    return np.uint8(code | sign)


@njit(error_model="numpy")
def _turned(whole: Any) -> Any:
    """The bits of a float32 as an integer in the order of the values; undoes itself."""
    return np.int32(whole ^ ((whole >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(error_model="numpy")
def _value(key: Any) -> Any:
    return float_of_bits(np.uint32(_turned(key)))


def extremes(
    values: Any,
    mins: Any,
    maxs: Any,
    start: int,
    count: int,
    columns: int,
    matrix_rows: int,
    block_rows: int,
    block_columns: int,
    scale_rows: int,
    scale_columns: int,
    first_scale: int,
) -> np.int64:
    """Lower `mins` and raise `maxs` of blocks by some of their values, none of them NaN."""
    given = carray(values, count)
    first, last = start // columns, (start + count - 1) // columns
    rows = scale_row(last, matrix_rows, scale_rows, block_rows) + 1 - first_scale
    least, most = carray(mins, rows * scale_columns), carray(maxs, rows * scale_columns)
    for row in range(first, last + 1):
        at = (scale_row(row, matrix_rows, scale_rows, block_rows) - first_scale) * scale_columns
        begin = max(start - row * columns, 0)
        end = min(start + count - row * columns, columns)
        block = begin // block_columns
        while begin < end:
            stop = min((block + 1) * block_columns, end)
            part = given[row * columns - start + begin : row * columns - start + stop]
            # As integers: LLVM vectorises a minimum of integers, and not one of floats.
            low = high = _turned(np.int32(bits_of_float(part[0])))
            for i in range(stop - begin):
                key = _turned(np.int32(bits_of_float(part[i])))
                low, high = min(low, key), max(high, key)
            least[at + block] = min(least[at + block], _value(low))
            most[at + block] = max(most[at + block], _value(high))
            begin = stop
            block += 1
    return np.int64(0)


def encode(
    values: Any,
    scales: Any,
    zeros: Any,
    codes: Any,
    kind: int,
    low: int,
    high: int,
    start: int,
    count: int,
    columns: int,
    matrix_rows: int,
    block_rows: int,
    block_columns: int,
    scale_rows: int,
    scale_columns: int,
    first_scale: int,
) -> np.int64:
    """Write a code of a byte for each value.

    `kind` is 0 for float8 E4M3 of value·scale, 1 for that of value/scale, 2 for an integer from
    `low` to `high` near value/scale + zero, and 3 for a float of 4 bits near value/scale. 4 is 3
    without a zero point, so that −0.0 keeps its sign.
    """
    given, made = carray(values, count), carray(codes, count)
    first, last = start // columns, (start + count - 1) // columns
    rows = scale_row(last, matrix_rows, scale_rows, block_rows) + 1 - first_scale
    factors, offsets = carray(scales, rows * scale_columns), carray(zeros, rows * scale_columns)
    least, most = np.float32(low), np.float32(high)
    for row in range(first, last + 1):
        at = (scale_row(row, matrix_rows, scale_rows, block_rows) - first_scale) * scale_columns
        begin = max(start - row * columns, 0)
        end = min(start + count - row * columns, columns)
        block = begin // block_columns
        while begin < end:
            stop = min((block + 1) * block_columns, end)
            factor, offset = factors[at + block], offsets[at + block]
            base = row * columns - start
            part, target = given[base + begin : base + stop], made[base + begin : base + stop]
            if kind == 0:
                for i in range(stop - begin):
                    target[i] = _to_e4m3(part[i] * factor)
            elif kind == 1:
                for i in range(stop - begin):
                    # The reference adds a zero point of 0, and so makes −0.0 to 0.0.
                    target[i] = _to_e4m3(np.float32(part[i] / factor) + offset)
            elif kind == 2:
                for i in range(stop - begin):
                    value = np.float32(part[i] / factor) + offset
                    value = np.rint(min(max(value, least), most))
                    target[i] = np.uint8(np.int32(value) & 255)
            elif kind == 3:
                for i in range(stop - begin):
                    target[i] = _to_e2m1(np.float32(part[i] / factor) + offset)
            else:
                for i in range(stop - begin):
                    target[i] = _to_e2m1(np.float32(part[i] / factor))
            begin = stop
            block += 1
    return np.int64(0)
