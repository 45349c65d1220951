"""Lossy blocks of a packed tensor: codes of 8 or 4 bits, and a scale for each row.

The content of such a block is the scales, each a bfloat16 of two bytes (little-endian), and the
codes. A row is the last dimension of the tensor; a row that a block has only a part of has a scale
in each block, so that a block decodes alone. The value of a code is (code − zero) · scale, which is
exact in float32: zero is 128 for int8 and 8 for int4. int4 has two codes a byte, the first one in
the low half; an odd number ends with a code of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.kernels.native import kernel
from diffxfer.kernels.signatures import SCRATCH

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rounding:
    """A lossy form.

    Attributes:
        name: as users know it.
        form: the first byte of a block.
        bits: the bits of a code.
        steps: how many scales are tried for a row: one, by its largest element, or fractions of it
            too.
    """

    name: str
    form: int
    bits: int
    steps: int

    @property
    def most(self) -> int:
        """The largest integer of a code."""
        return (1 << (self.bits - 1)) - 1

    def size(self, count: int, first: int, width: int) -> int:
        """The bytes of a block's content.

        Args:
            count: its number of elements.
            first: the place of its first element in a row.
            width: the elements of a row.
        """
        return 2 * rows_of(count, first, width) + -(-count * self.bits // 8)


ROUNDINGS = {
    # Fractions gain nothing for int8; for int4 they took the error from 12.1 to 10.8 % of ‖Δ‖.
    "int8": Rounding("int8", 4, 8, 1),
    "int4": Rounding("int4", 5, 4, 8),
}
"""The lossy forms by name."""


def rows_of(count: int, first: int, width: int) -> int:
    """The rows of which a block has a part."""
    return -(-(first + count) // width)


def encode(
    values: NDArray[np.float64], rounding: Rounding, first: int, width: int
) -> tuple[list[NDArray[np.uint8]], NDArray[np.float64]] | None:
    """Round values to codes.

    Args:
        values: the values of a block.
        rounding: the form.
        first: the place of the first value in its row.
        width: the elements of a row.

    Returns:
        Scales and codes, and the values that they stand for; None if a value is not finite, or so
        large that its code times its scale may not be.
    """
    count = len(values)
    values = np.ascontiguousarray(values)
    scales, codes = np.empty(rows_of(count, first, width), "<u2"), np.empty(count, np.uint8)
    rounded, lanes = np.empty(count), np.empty(SCRATCH)
    addresses = [array.ctypes.data for array in (values, scales, codes, rounded, lanes)]
    numbers = count, first, width, rounding.most, rounding.steps
    if kernel("quantise", ("F64", "BF16", "U8", "F64", "F64"))(*addresses, *numbers):
        return None
    if rounding.bits == 4:
        even = np.full(count + count % 2, rounding.most + 1, np.uint8)
        even[:count] = codes
        codes = even[::2] | even[1::2] << np.uint8(4)
    return [scales.view(np.uint8), codes], rounded


def decode(
    content: NDArray[np.uint8], rounding: Rounding, count: int, first: int, width: int
) -> NDArray[np.float32]:
    """The values of a block.

    Args:
        content: its content, of the right size; otherwise not trusted.
        rounding: its form.
        count: its number of elements.
        first: the place of the first element in its row.
        width: the elements of a row.
    """
    end = 2 * rows_of(count, first, width)
    scales, codes = np.ascontiguousarray(content[:end]), content[end:]
    if rounding.bits == 4:
        halves = np.empty((len(codes), 2), np.uint8)
        halves[:, 0], halves[:, 1] = codes & 15, codes >> 4
        codes = halves.reshape(-1)
    codes, made = np.ascontiguousarray(codes), np.empty(count, np.float32)
    addresses = [array.ctypes.data for array in (codes, scales, made)]
    numbers = count, first, width, rounding.most
    kernel("dequantise", ("U8", "BF16", "F32"))(*addresses, *numbers)
    return made
