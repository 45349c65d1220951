"""One block of a packed tensor: float32 or float64 values, compressed.

A block is a byte that states its form, the number of bytes of its bits (a uint32, little-endian),
the bits, and one frame of zstd. A reader needs nothing else. The forms:

- 1: float32. The frame holds a bit for each element, the first one in the highest bit of its byte:
  1 if the element has a symbol, else it is 0.0; then the symbols, a byte each; then the table: 256
  numbers g, 256 numbers n and 256 lengths, each an int16. `kernels.packing` tells how symbols and
  bits make elements.
- 2: float64, in the same way.
- 3: float32 or float64. There are no bits; the frame holds 4 or 8 planes of bytes, the lowest byte
  first. It is for small blocks, and for numbers that have no kind.
- 4 and 5: int8 and int4. There are no bits; the frame holds scales and codes, see `rounding`. These
  two lose something.

If the form's highest bit is 1, the block has `exceptions`: a second frame of zstd, and its size as
a uint32 (little-endian) at the end of the block.

zstd codes the symbols by their frequency. The bits are nearly random, and stored as they are.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from diffxfer.checkpoints.encodings import exceptions
from diffxfer.checkpoints.encodings import rounding as lossy
from diffxfer.kernels.native import kernel

if TYPE_CHECKING:
    from diffxfer.checkpoints.encodings.exceptions import Exceptions
    from diffxfer.checkpoints.encodings.rounding import Rounding

BLOCK = 1 << 18
"""Elements of a block: those of a checksum's block."""
MOST_BYTES = (9 + exceptions.MOST_BYTES) * BLOCK
"""No block is larger: compression adds less than an eighth."""
LEVELS = range(1, 20)
"""Levels of compression; the first one hardly does more than to code bytes by their frequency."""

_SINGLES, _DOUBLES, _PLANES = 1, 2, 3
_ROUNDED = {rounding.form: rounding for rounding in lossy.ROUNDINGS.values()}
_WITH_EXCEPTIONS = 0x80
_SIZE = struct.Struct("<I")
_HEAD = struct.Struct("<BI")
_SYMBOLS = 256
_TABLE = 3 * 2 * _SYMBOLS
_NO_KIND, _FIRST = 2, 3
"""The kind of what has none, and the number of kinds without an exponent."""
_ZERO, _NOTHING = -2000, 64
"""The g of zeros, and the n that adds nothing."""
_SMALL = 128
"""Up to so many elements, the table of symbols takes more than it saves."""
_MANY_ZEROS = 0.25
"""From this share on, zeros get no symbol: zstd would search their runs, and its code for one takes
a bit at least."""
_OWN_CODE = 8192
"""Elements whose symbols deserve a code of their own: its description takes up to 128 bytes."""
_NEW_CODE = zstandard.COMPRESSOBJ_FLUSH_BLOCK


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

Singles: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Bytes: TypeAlias = NDArray[np.uint8]

_own = threading.local()


class PackingError(ValueError):
    """A block that is not what a writer makes; the text says what was expected and found."""


def version() -> str:
    """The version of the compressor, on which a block's bytes depend."""
    return ".".join(str(part) for part in zstandard.ZSTD_VERSION)


class BlockEncoder:
    """Compresses blocks; one for each thread.

    Args:
        level: one of `LEVELS`.
    """

    def __init__(self, level: int) -> None:
        parameters = [_fast()]
        if level != LEVELS[0]:
            parameters.append(zstandard.ZstdCompressionParameters.from_level(level))
        self._compressors = [zstandard.ZstdCompressor(compression_params=p) for p in parameters]
        most = max(each.kinds for each in _NUMBERINGS.values())
        self._counts, self._ranks = np.empty(most, np.uint32), np.zeros(most, np.uint8)
        self._kinds = np.empty(BLOCK, np.uint32)
        self._symbols, self._words = (
            np.empty(BLOCK + 1, np.uint8),
            np.empty(7 * BLOCK + 8, np.uint8),
        )

    def encode(self, values: Singles | Doubles) -> bytes:
        """Compress float32 or float64 values.

        Args:
            values: at most `BLOCK` of them, one after the other in memory.
        """
        assert values.flags.c_contiguous
        dtype = "F32" if values.dtype == np.float32 else "F64"
        made = self._symbols_of(values, dtype) if len(values) > _SMALL else None
        return self.encode_planes(values) if made is None else made

    def encode_planes(self, values: Singles | Doubles) -> bytes:
        """Compress float32 or float64 values, so that they are simple to read.

        Args:
            values: at most `BLOCK` of them, one after the other in memory.
        """
        planes = values.view(np.uint8).reshape(len(values), -1).T
        frame = self._compress([np.ascontiguousarray(plane) for plane in planes])
        return _HEAD.pack(_PLANES, 0) + frame

    def encode_rounded(
        self, values: Doubles, rounding: Rounding, first: int, width: int
    ) -> tuple[bytes, Doubles] | None:
        """Round values to codes, and compress these: that saves 6 % of int8 and 12 % of int4.

        Args:
            values: at most `BLOCK` of them.
            rounding: the form.
            first: the place of the first value in its row.
            width: the elements of a row.

        Returns:
            The block, and the values that it decodes to; None if these values cannot be rounded.
        """
        found = lossy.encode(values, rounding, first, width)
        if found is None:
            return None
        parts, rounded = found
        return _HEAD.pack(rounding.form, 0) + self._compress(parts), rounded

    def add_exceptions(self, block: bytes, found: Exceptions, count: int) -> bytes:
        """Add exceptions to a block that has none.

        Args:
            block: its bytes.
            found: the exceptions.
            count: the number of elements of the block.
        """
        # A frame with a checksum: nothing else covers these bytes when a block is decoded.
        content = exceptions.pack(found, count)
        frame = zstandard.ZstdCompressor(write_checksum=True).compress(content)
        form = block[0] | _WITH_EXCEPTIONS
        return b"".join((bytes((form,)), block[1:], frame, _SIZE.pack(len(frame))))

    def _symbols_of(self, values: Singles | Doubles, dtype: str) -> bytes | None:
        """A block of symbols; None if there are numbers without a kind, or too many kinds."""
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
        frame = self._compress([flags, self._symbols[:given], table.reshape(-1).view(np.uint8)])
        form = _SINGLES if dtype == "F32" else _DOUBLES
        return b"".join((_HEAD.pack(form, len(rest)), rest, frame))

    def _compress(self, parts: list[Bytes]) -> bytes:
        """The shortest frame: matches that a higher level finds may cost more than they save."""
        return min((_frame(each, parts) for each in self._compressors), key=len)


def _fast() -> zstandard.ZstdCompressionParameters:
    """Matches are hardly ever worth it in these bytes, so spend no time on them."""
    return zstandard.ZstdCompressionParameters(
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        strategy=zstandard.STRATEGY_FAST,
    )


def _frame(compressor: zstandard.ZstdCompressor, parts: list[Bytes]) -> bytes:
    """The frame of zstd of all parts."""
    frame = compressor.compressobj(size=sum(map(len, parts)))
    made = []
    for part in parts:
        made.append(frame.compress(part.data))
        if len(part) >= _OWN_CODE:
            made.append(frame.flush(_NEW_CODE))
    return b"".join((*made, frame.flush()))


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


def decode(data: memoryview, count: int, first: int = 0, width: int = 1) -> Singles | Doubles:
    """The values of a block.

    Args:
        data: its bytes, not trusted.
        count: its number of elements, at most `BLOCK`.
        first: the place of its first element in a row.
        width: the elements of a row.

    Raises:
        PackingError: if it is not a block of so many elements.
    """
    data, _ = _divide(data)
    if len(data) < _HEAD.size:
        raise PackingError(f"expected {_HEAD.size} bytes or more, found {len(data):,}")
    form, size = _HEAD.unpack(data[: _HEAD.size])
    form &= ~_WITH_EXCEPTIONS
    if form not in (_SINGLES, _DOUBLES, _PLANES, *_ROUNDED):
        raise PackingError(f"expected the form 1 to 5, found {form} in {len(data):,} bytes")
    rest, frame = data[_HEAD.size :][:size], data[_HEAD.size + size :]
    if form in (_SINGLES, _DOUBLES):
        other = -(-count // 8) + _TABLE
        content = _decompress(frame, other, other + count)
        return _join(content, rest, count, "F32" if form == _SINGLES else "F64")
    if size:
        raise PackingError(f"expected no bits, found {size:,} bytes")
    if form == _PLANES:
        return _join_planes(_decompress(frame, 4 * count, 8 * count), count)
    size = _ROUNDED[form].size(count, first, width)
    content = _decompress(frame, size, size)
    return lossy.decode(content, _ROUNDED[form], count, first, width)


def decode_exceptions(data: memoryview, count: int) -> Exceptions | None:
    """The exceptions of a block, None if it has none.

    Args:
        data: its bytes, not trusted.
        count: its number of elements, at most `BLOCK`.

    Raises:
        PackingError: if they are not the exceptions of a block of so many elements.
    """
    frame = _divide(data)[1]
    if frame is None:
        return None
    bits = -(-count // 8)
    content = _decompress(frame, 1 + bits, 1 + bits + 8 * count)
    try:
        return exceptions.unpack(content, count)
    except exceptions.ExceptionsError as exc:
        raise PackingError(str(exc)) from exc


def _divide(data: memoryview) -> tuple[memoryview, memoryview | None]:
    """A block without its exceptions, and their frame if it has any."""
    if not len(data) or not data[0] & _WITH_EXCEPTIONS:
        return data, None
    room = len(data) - _HEAD.size - _SIZE.size
    size = _SIZE.unpack(data[-_SIZE.size :])[0] if room > 0 else 0
    if not 0 < size < room:
        raise PackingError(
            f"expected fewer than {max(room, 0):,} bytes of exceptions, found {size:,}"
        )
    end = len(data) - _SIZE.size
    return data[: end - size], data[end - size : end]


def _join_planes(planes: Bytes, count: int) -> Singles | Doubles:
    """The elements of a block from its planes."""
    size = len(planes) // count
    if len(planes) != size * count or size not in (4, 8):
        raise PackingError(f"expected 4 or 8 planes of {count:,} bytes, found {len(planes):,}")
    elements = np.ascontiguousarray(planes.reshape(size, count).T)
    if size == 8:
        return elements.view(np.float64).reshape(count)
    return elements.view(np.float32).reshape(count)


def _decompress(frame: memoryview, least: int, most: int) -> Bytes:
    """The content of a frame, whose size is checked before any memory is allocated for it."""
    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if not least <= stated <= most:
            expected = f"{most:,}" if least == most else f"{least:,} to {most:,}"
            found = "no size" if stated == zstandard.CONTENTSIZE_UNKNOWN else f"{stated:,}"
            raise PackingError(f"expected a frame of {expected} bytes, found {found}")
        content = _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise PackingError(f"expected a whole frame of zstd, found another ({exc})") from exc
    return np.frombuffer(content, np.uint8)


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor."""
    known = getattr(_own, "decompressor", None)
    if known is None:
        known = _own.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 23)
    found: zstandard.ZstdDecompressor = known
    return found


def _join(content: Bytes, rest: memoryview, count: int, dtype: str) -> Singles | Doubles:
    """The elements of a block, from what its frame holds and its bits."""
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
