"""Decoding quantised weights to float32, in one pass. Imported only by numba's compiler.

    value = (code − zero)·scale

Both steps are in float32, and each is rounded, as the libraries that define the formats compute it.
A matrix is divided into blocks that share a scale; `scales` and `zeros` have one float32 for each.

Elements are numbered in row-major order, over all matrices of a tensor. `first_scale` is the row of
`scales` that is given first; `matrix_rows` and `scale_rows` are the rows of one matrix and of its
scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import read


@njit(error_model="numpy")
def _e4m3(code: Any) -> Any:
    """The value of a float8 of 4 exponent and 3 mantissa bits, with NaN and no infinity."""
    magnitude = np.uint16(code) & np.uint16(0x7F)
    sign = np.uint16(np.uint16(code) & np.uint16(0x80)) << np.uint16(8)
    # The same bits in float16 are 2⁻⁸ times the value: its exponent's bias is 15, here 7.
    half = np.int16(np.uint16(np.uint16(magnitude << np.uint16(7)) | np.uint16(sign)))
    value = np.float32(read(half)) * np.float32(256.0)
    return np.float32(np.nan) if magnitude == np.uint16(0x7F) else value


@njit(error_model="numpy")
def scale_row(row: int, matrix_rows: int, scale_rows: int, block_rows: int) -> int:
    """The row of scales for a row of values."""
    matrix = row // matrix_rows
    return matrix * scale_rows + (row - matrix * matrix_rows) // block_rows


def decode_e4m3(
    codes: Any,
    scales: Any,
    out: Any,
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
    """Decode elements of float8 E4M3; `codes` begins with the first one."""
    given, made = carray(codes, count), carray(out, count)
    first, last = start // columns, (start + count - 1) // columns
    rows = scale_row(last, matrix_rows, scale_rows, block_rows) + 1 - first_scale
    factors = carray(scales, rows * scale_columns)
    for row in range(first, last + 1):
        at = (scale_row(row, matrix_rows, scale_rows, block_rows) - first_scale) * scale_columns
        low = max(start - row * columns, 0)
        high = min(start + count - row * columns, columns)
        block = low // block_columns
        while low < high:
            stop = min((block + 1) * block_columns, high)
            factor = factors[at + block]
            base = row * columns - start
            part, target = given[base + low : base + stop], made[base + low : base + stop]
            for i in range(stop - low):
                target[i] = _e4m3(part[i]) * factor
            low = stop
            block += 1
    return np.int64(0)


def decode_int8(
    codes: Any,
    scales: Any,
    zeros: Any,
    out: Any,
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
    """Decode elements of int8; `codes` begins with the first one."""
    given, made = carray(codes, count), carray(out, count)
    first, last = start // columns, (start + count - 1) // columns
    rows = scale_row(last, matrix_rows, scale_rows, block_rows) + 1 - first_scale
    factors, offsets = carray(scales, rows * scale_columns), carray(zeros, rows * scale_columns)
    for row in range(first, last + 1):
        at = (scale_row(row, matrix_rows, scale_rows, block_rows) - first_scale) * scale_columns
        low = max(start - row * columns, 0)
        high = min(start + count - row * columns, columns)
        block = low // block_columns
        while low < high:
            stop = min((block + 1) * block_columns, high)
            factor, offset = factors[at + block], offsets[at + block]
            base = row * columns - start
            part, target = given[base + low : base + stop], made[base + low : base + stop]
            for i in range(stop - low):
                target[i] = (np.float32(np.int8(part[i])) - offset) * factor
            low = stop
            block += 1
    return np.int64(0)


def decode_nibbles(
    codes: Any,
    table: Any,
    scales: Any,
    zeros: Any,
    out: Any,
    start: int,
    count: int,
    columns: int,
    stride: int,
    skipped: int,
    high_first: int,
    matrix_rows: int,
    block_rows: int,
    block_columns: int,
    scale_rows: int,
    scale_columns: int,
    first_scale: int,
) -> np.int64:
    """Decode elements of 4 bits: ``table[code]`` is the value of a code.

    A row takes `stride` nibbles, and `codes` lacks the first `skipped` nibbles of the tensor, an
    even number. The lower half of a byte comes first, unless `high_first` is 1.
    """
    made, values = carray(out, count), carray(table, 16)
    first, last = start // columns, (start + count - 1) // columns
    final = last * stride + start + count - 1 - last * columns - skipped
    given = carray(codes, final // 2 + 1)
    rows = scale_row(last, matrix_rows, scale_rows, block_rows) + 1 - first_scale
    factors, offsets = carray(scales, rows * scale_columns), carray(zeros, rows * scale_columns)
    for row in range(first, last + 1):
        at = (scale_row(row, matrix_rows, scale_rows, block_rows) - first_scale) * scale_columns
        low = max(start - row * columns, 0)
        high = min(start + count - row * columns, columns)
        place = row * stride - skipped
        block = low // block_columns
        while low < high:
            stop = min((block + 1) * block_columns, high)
            factor, offset = factors[at + block], offsets[at + block]
            target = made[row * columns - start + low : row * columns - start + stop]
            for i in range(stop - low):
                nibble = place + low + i
                shift = np.uint32(((nibble & 1) ^ high_first) * 4)
                code = (np.uint32(given[nibble >> 1]) >> shift) & np.uint32(15)
                target[i] = (values[code] - offset) * factor
            low = stop
            block += 1
    return np.int64(0)


def decode_transposed(
    codes: Any,
    table: Any,
    scales: Any,
    out: Any,
    start: int,
    count: int,
    rows: int,
    groups: int,
) -> np.int64:
    """Decode elements of one matrix of 4 bits that is stored transposed, as gpt-oss does.

    `codes` has the shape (rows, groups, 16), two numbers a byte, and `scales` (rows, groups). The
    decoded matrix has the shape (groups·32, rows).
    """
    made, values = carray(out, count), carray(table, 16)
    given, factors = carray(codes, rows * groups * 16), carray(scales, rows * groups)
    first, last = start // rows, (start + count - 1) // rows
    # A few rows at a time: their codes for all columns stay in the L1 cache.
    for tile in range(0, rows, 64):
        for column in range(first, last + 1):
            group, inside = column >> 5, column & 31
            shift = np.uint32((inside & 1) * 4)
            at, place = column * rows - start, group * 16 + (inside >> 1)
            for row in range(max(-at, tile), min(rows, tile + 64, count - at)):
                code = (np.uint32(given[row * groups * 16 + place]) >> shift) & np.uint32(15)
                made[at + row] = values[code] * factors[row * groups + group]
    return np.int64(0)
