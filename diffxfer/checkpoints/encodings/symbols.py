"""Symbols and bits of a block of a packed tensor.

The frame of such a block holds a bit for each element, the first one in the highest bit of its
byte: 1 if the element has a symbol, else it is 0.0; then the symbols, a byte each; then the table:
256 numbers g, 256 numbers n and 256 lengths, each an int16. `kernels.packing` tells how symbols and
bits make elements.

zstd codes the symbols by their frequency. The bits are nearly random, and stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffxfer.kernels.native import kernel

_SYMBOLS = 256
_TABLE = 3 * 2 * _SYMBOLS
_NO_KIND, _FIRST = 2, 3
"""The kind of what has none, and the number of kinds without an exponent."""
_ZERO, _NOTHING = -2000, 64
"""The g of zeros, and the n that adds nothing."""
_MANY_ZEROS = 0.25
"""From this share on, zeros get no symbol: zstd would search their runs, and its code for one takes
a bit at least."""

Singles: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Bytes: TypeAlias = NDArray[np.uint8]


class PackingError(ValueError):
    """A block that is not what a writer makes; the text says what was expected and found."""


@dataclass(frozen=True)
class _Numbering:
    """How kinds are numbered, see `kernels.packing`.

    Attributes:
        low: the lowest exponent.
        span: the number of exponents.
        steps: the numbers that a step can be.
        skip: what is subtracted from a step.
        most: the largest n and length.
    """

    low: int
    span: int
    steps: int
    skip: int
    most: tuple[int, int]

    @property
    def kinds(self) -> int:
        """The number of kinds."""
        return (self.span + 1) * self.steps


_NUMBERINGS = {
    "F32": _Numbering(low=874, span=277, steps=32, skip=29, most=(23, 24)),
    "F64": _Numbering(low=1, span=2046, steps=64, skip=0, most=(52, 53)),
}


@dataclass(frozen=True, slots=True)
class Symbols:
    """What a block of symbols holds.

    Attributes:
        bits: the bits.
        parts: the parts of the content of its frame; valid until the next block is encoded.
    """

    bits: bytes
    parts: list[Bytes]


class SymbolEncoder:
    """Makes symbols and bits; one for each thread.

    Args:
        most: the most elements of a block.
    """

    def __init__(self, most: int) -> None:
        kinds = max(each.kinds for each in _NUMBERINGS.values())
        self._counts, self._ranks = np.empty(kinds, np.uint32), np.zeros(kinds, np.uint8)
        self._kinds, self._symbols = np.empty(most, np.uint32), np.empty(most + 1, np.uint8)
        self._words = np.empty(7 * most + 8, np.uint8)

    def encode(self, values: Singles | Doubles) -> Symbols | None:
        """Make symbols and bits of float32 or float64 values.

        Args:
            values: the elements of a block, one after the other in memory.

        Returns:
            The symbols; None if there are numbers without a kind, or too many kinds.
        """
        dtype = "F32" if values.dtype == np.float32 else "F64"
        numbers, count = _NUMBERINGS[dtype], len(values)
        counts, ranks = self._counts[: numbers.kinds], self._ranks[: numbers.kinds]
        arrays = values, self._kinds, counts
        kernel("count_kinds", (dtype, "U32", "U32"))(
            *(array.ctypes.data for array in arrays),
            *(count, numbers.low, numbers.span, numbers.steps, numbers.skip),
        )
        table = None if counts[_NO_KIND] else _choose(counts, ranks, numbers)
        if table is None:
            return None
        zeros = int(counts[0])
        given, flags = count, np.full(-(-count // 8), 255, np.uint8)
        if zeros > count * _MANY_ZEROS:
            present = values.view(np.uint32 if dtype == "F32" else np.uint64) != 0
            given, flags = count - zeros, np.packbits(present)
        lengths = table[2].astype(np.uint8)
        made = values, self._kinds, ranks, lengths, self._symbols, self._words
        bits = kernel("split", (dtype, "U32", "U8", "U8", "U8", "U8"))(
            *(array.ctypes.data for array in made),
            *(count, numbers.kinds, numbers.steps, numbers.skip, int(given < count)),
        )
        rest = self._words[: -(-bits // 8)].tobytes()
        return Symbols(rest, [flags, self._symbols[:given], table.reshape(-1).view(np.uint8)])


def _choose(
    counts: NDArray[np.uint32], ranks: Bytes, numbers: _Numbering
) -> NDArray[np.int16] | None:
    """Give symbols to kinds; returns the table of symbols, None if there are too many kinds."""
    kinds = (counts != 0).nonzero()[0]  # ten times as quick as without `!= 0`
    steps = kinds % numbers.steps + numbers.skip
    rows = np.empty((3, len(kinds)), np.int64)
    rows[0] = kinds // numbers.steps + (numbers.low - 1 + steps - 1076)
    rows[1] = 53 - steps
    rows[2] = np.maximum(1, rows[1])
    zeros = int(np.searchsorted(kinds, _FIRST))
    rows[0, :zeros], rows[1, :zeros], rows[2, :zeros] = _ZERO, 0, kinds[:zeros]
    table = np.zeros((3, _SYMBOLS), np.int16)
    order = np.arange(len(kinds))
    if len(kinds) > _SYMBOLS:
        # The rare kinds of one g have one symbol.
        own = _SYMBOLS - len(np.unique(rows[0]))
        if own <= 0:
            return None
        common = np.argsort(counts[kinds], kind="stable")[::-1][:own]
        is_rare = np.full(len(kinds), True)
        is_rare[common] = False
        found, inverse = np.unique(rows[0, is_rare], return_inverse=True)
        lengths = np.zeros(len(found), np.int64)
        np.maximum.at(lengths, inverse, rows[1, is_rare] + 1)
        order[~is_rare], order[is_rare] = np.arange(own), own + inverse
        shared = np.stack([found, np.full_like(found, _NOTHING), lengths])
        rows = np.concatenate([rows[:, ~is_rare], shared], axis=1)
    ranks[kinds] = order
    table[:, : rows.shape[1]] = rows
    return table


def least_content(count: int) -> int:
    """The least bytes that the frame of a block of so many elements holds."""
    return -(-count // 8) + _TABLE


def join(content: Bytes, rest: memoryview, count: int, dtype: str) -> Singles | Doubles:
    """The elements of a block.

    Args:
        content: what its frame holds, of `least_content` bytes or more; otherwise not trusted.
        rest: its bits, not trusted.
        count: the number of elements.
        dtype: ``"F32"`` or ``"F64"``.

    Raises:
        PackingError: if it is not what a writer makes.
    """
    symbols, flags = content[-(-count // 8) : -_TABLE], np.unpackbits(content, count=count)
    expected = int(np.count_nonzero(flags))
    if len(symbols) != expected:
        raise PackingError(f"expected {expected:,} symbols, found {len(symbols):,}")
    exponents, firsts, lengths = content[-_TABLE:].copy().view("<i2").reshape(3, _SYMBOLS)
    n, length = _NUMBERINGS[dtype].most
    if not ((firsts >= 0) & (firsts <= n) | (firsts == _NOTHING)).all():
        raise PackingError(f"expected numbers n up to {n} or {_NOTHING}, found another")
    if not ((lengths >= 0) & (lengths <= length)).all():
        raise PackingError(f"expected lengths up to {length}, found {lengths.max()}")
    with np.errstate(over="ignore"):
        scales = np.ldexp(1.0, exponents.astype(np.int32))
    highest = np.left_shift(np.uint64(1), firsts.astype(np.uint64))
    words = np.empty(len(rest) + 8, np.uint8)
    words[: len(rest)], words[len(rest) :] = rest, 0
    made: Singles | Doubles = np.empty(count, np.float64)
    if dtype == "F32":
        made = np.empty(count, np.float32)
    arrays = symbols, flags, lengths.astype(np.uint8), highest, scales, words, made
    bits = kernel("join", ("U8", "U8", "U8", "U64", "F64", "U8", dtype))(
        *(array.ctypes.data for array in arrays), count, len(rest)
    )
    if -(-bits // 8) != len(rest):
        raise PackingError(f"expected {-(-bits // 8):,} bytes of bits, found {len(rest):,}")
    return made
