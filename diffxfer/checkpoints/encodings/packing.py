"""One block of a packed tensor: float32 or float64 values, compressed without loss.

A block is a byte that states its form, the number of bytes of its bits (a uint32, little-endian),
the bits, and one frame of zstd. A reader needs nothing else. The forms:

- 1: float32. The frame holds a bit for each element, the first one in the highest bit of its byte:
  1 if the element has a symbol, else it is +0.0; then the symbols, a byte each; then the table of
  symbols: 256 exponents, 256 steps and 256 lengths. `kernels.packing` tells how symbols and bits
  make elements.
- 2: float64, or float32 of a small block. There are no bits; the frame holds 8 or 4 planes of
  bytes, the lowest byte first.

zstd codes the symbols by their frequency. The bits are nearly random, and stored as they are.
"""

from __future__ import annotations

import struct
import threading
from typing import TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from diffxfer.kernels.native import kernel

BLOCK = 1 << 18
"""Elements of a block: those of a checksum's block."""
MOST_BYTES = 9 * BLOCK
"""No block is larger: compression adds less than an eighth."""
LEVELS = range(1, 20)
"""Levels of compression; the first one hardly does more than to code bytes by their frequency."""

_KNOWN, _PLANES = 1, 2
_HEAD = struct.Struct("<BI")
_KINDS, _SYMBOLS = 8192, 256
_TABLE = 3 * _SYMBOLS
_POWER, _ZERO = 24, 25
"""The step of powers of two, and the kind of +0.0; a kind is 32 · exponent + step."""
_LENGTHS = np.array([32, *range(23, 0, -1), 1, 0], np.uint8)
"""The number of bits by step."""
_LARGEST = np.repeat(np.array([255, 31, 32], np.uint8), _SYMBOLS)
"""The largest numbers in a table."""
_SMALL = 256
"""Up to so many elements, the table of symbols may take more than it saves."""
_MANY_ZEROS = 0.25
"""From this share on, zeros get no symbol: zstd would search their runs, and its code for one takes
a bit at least."""
_OWN_CODE = 8192
"""Elements whose symbols deserve a code of their own: its description takes up to 128 bytes."""
_NEW_CODE = zstandard.COMPRESSOBJ_FLUSH_BLOCK

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
        if level == LEVELS[0]:
            # Matches are hardly ever worth it in these bytes, so do not spend time on them.
            parameters = zstandard.ZstdCompressionParameters(
                window_log=17,
                hash_log=6,
                chain_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
                strategy=zstandard.STRATEGY_FAST,
            )
        else:
            parameters = zstandard.ZstdCompressionParameters.from_level(level)
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._counts, self._ranks = np.empty(_KINDS, np.uint32), np.zeros(_KINDS, np.uint8)
        self._symbols, self._words = np.empty(BLOCK + 1, np.uint8), np.empty(BLOCK + 1, np.uint32)

    def encode(self, values: Singles) -> bytes:
        """Compress float32 values.

        Args:
            values: at most `BLOCK` of them.
        """
        values = np.ascontiguousarray(values)
        known = self._encode(values)
        return known if len(values) > _SMALL else min(known, self._planes(values), key=len)

    def _encode(self, values: Singles) -> bytes:
        whole = values.view(np.uint32)
        count = len(whole)
        kernel("count_kinds", ("U32", "U32"))(whole.ctypes.data, self._counts.ctypes.data, count)
        zeros = int(self._counts[_ZERO])
        given, flags = count, np.full(-(-count // 8), 255, np.uint8)
        if zeros > count * _MANY_ZEROS:
            given, flags = count - zeros, np.packbits(whole != 0)
        table = self._choose()
        arrays = whole, self._ranks, table, self._symbols, self._words
        bits = kernel("split", ("U32", "U8", "U8", "U8", "U32"))(
            *(array.ctypes.data for array in arrays), count, int(given < count)
        )
        rest = self._words.data.cast("B")[: -(-bits // 8)]
        frame = self._compress([flags, self._symbols[:given], table])
        return b"".join((_HEAD.pack(_KNOWN, len(rest)), rest, frame))

    def encode_wide(self, values: Doubles) -> bytes:
        """Compress float64 values.

        Args:
            values: at most `BLOCK` of them.
        """
        return self._planes(np.ascontiguousarray(values))

    def _planes(self, values: Singles | Doubles) -> bytes:
        planes = values.view(np.uint8).reshape(len(values), -1).T
        frame = self._compress([np.ascontiguousarray(plane) for plane in planes])
        return _HEAD.pack(_PLANES, 0) + frame

    def _choose(self) -> Bytes:
        """Give symbols to the commonest kinds; returns the table of symbols."""
        kinds = (self._counts != 0).nonzero()[0]  # ten times as quick as without `!= 0`
        if len(kinds) >= _SYMBOLS:
            order = np.argsort(self._counts[kinds], kind="stable")
            kinds = np.sort(kinds[order[1 - _SYMBOLS :]])
        self._ranks.fill(0)
        self._ranks[kinds] = np.arange(1, len(kinds) + 1)
        exponents, steps = kinds >> 5, kinds & 31
        table = np.zeros((3, _SYMBOLS), np.uint8)
        table[2, 0] = _LENGTHS[0]
        # A mantissa of 0 has no 1: what the step adds goes away by the exponent.
        is_zero = steps > _POWER
        table[:, 1 : len(kinds) + 1] = (
            exponents ^ (steps >= _POWER),
            steps - is_zero,
            _LENGTHS[steps],
        )
        return table.reshape(-1)

    def _compress(self, parts: list[Bytes]) -> bytes:
        frame = self._compressor.compressobj(size=sum(map(len, parts)))
        made = []
        for part in parts:
            made.append(frame.compress(part.data))
            if len(part) >= _OWN_CODE:
                made.append(frame.flush(_NEW_CODE))
        return b"".join((*made, frame.flush()))


def decode(data: memoryview, count: int) -> Singles | Doubles:
    """The values of a block.

    Args:
        data: its bytes, not trusted.
        count: its number of elements, at most `BLOCK`.

    Raises:
        PackingError: if it is not a block of so many elements.
    """
    form, size = _HEAD.unpack(data[: _HEAD.size]) if len(data) >= _HEAD.size else (-1, 0)
    if form not in (_KNOWN, _PLANES):
        raise PackingError(f"expected the form 1 or 2, found {form} in {len(data):,} bytes")
    rest, frame = data[_HEAD.size :][:size], data[_HEAD.size + size :]
    if form == _PLANES:
        if size:
            raise PackingError(f"expected no bits, found {size:,} bytes")
        return _join_planes(_decompress(frame, 4 * count, 8 * count), count)
    other = -(-count // 8) + _TABLE
    return _join(_decompress(frame, other, other + count), rest, count).view(np.float32)


def _join_planes(planes: Bytes, count: int) -> Singles | Doubles:
    """The elements of a block from its planes."""
    size = len(planes) // count
    if len(planes) != size * count or size not in (4, 8):
        raise PackingError(f"expected 4 or 8 planes of {count:,} bytes, found {len(planes):,}")
    elements = np.ascontiguousarray(planes.reshape(size, count).T)
    return elements.view(np.float64 if size == 8 else np.float32).reshape(count)


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


def _join(content: Bytes, rest: memoryview, count: int) -> NDArray[np.uint32]:
    """The elements of a block, from what its frame holds and its bits."""
    symbols, table = content[-(-count // 8) : -_TABLE], content[-_TABLE:]
    flags = np.unpackbits(content, count=count)
    expected = int(np.count_nonzero(flags))
    if len(symbols) != expected:
        raise PackingError(f"expected {expected:,} symbols, found {len(symbols):,}")
    if (table > _LARGEST).any():
        raise PackingError("expected steps up to 31 and lengths up to 32, found larger ones")
    words = np.zeros(len(rest) // 4 + 2, np.uint32)
    words.view(np.uint8)[: len(rest)] = rest
    made = np.empty(count, np.uint32)
    arrays = symbols, flags, table, words, made
    bits = kernel("join", ("U8", "U8", "U8", "U32", "U32"))(
        *(array.ctypes.data for array in arrays), count, len(words) - 2
    )
    if -(-bits // 8) != len(rest):
        raise PackingError(f"expected {-(-bits // 8):,} bytes of bits, found {len(rest):,}")
    return made
