"""One block of a packed tensor: float32 or float64 values, compressed.

A block is a byte that states its form, the number of bytes of its bits (a uint32, little-endian),
the bits, and one frame of zstd. A reader needs nothing else. The forms:

- 1 and 2: float32 and float64, as symbols and bits, see `symbols`.
- 3: float32 or float64. There are no bits; the frame holds 4 or 8 planes of bytes, the lowest byte
  first. It is for small blocks, and for numbers that have no kind.
- 4 and 5: int8 and int4. There are no bits; the frame holds scales and codes, see `rounding`. These
  two lose something.

If the form's highest bit is 1, the block has `exceptions`: a second frame of zstd, and its size as
a uint32 (little-endian) at the end of the block.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from diffxfer.checkpoints.encodings import exceptions
from diffxfer.checkpoints.encodings import rounding as lossy
from diffxfer.checkpoints.encodings.symbols import (
    Bytes,
    Doubles,
    PackingError,
    Singles,
    SymbolEncoder,
    join,
    least_content,
)

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
_SMALL = 128
"""Up to so many elements, the table of symbols takes more than it saves."""
_OWN_CODE = 8192
"""Elements whose symbols deserve a code of their own: its description takes up to 128 bytes."""
_NEW_CODE = zstandard.COMPRESSOBJ_FLUSH_BLOCK


_own = threading.local()


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
        self._symbols = SymbolEncoder(BLOCK)

    def encode(self, values: Singles | Doubles) -> bytes:
        """Compress float32 or float64 values.

        Args:
            values: at most `BLOCK` of them, one after the other in memory.
        """
        assert values.flags.c_contiguous
        made = self._symbols.encode(values) if len(values) > _SMALL else None
        if made is None:
            return self.encode_planes(values)
        form = _SINGLES if values.dtype == np.float32 else _DOUBLES
        return b"".join((_HEAD.pack(form, len(made.bits)), made.bits, self._compress(made.parts)))

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
        content = _decompress(frame, least_content(count), least_content(count) + count)
        return join(content, rest, count, "F32" if form == _SINGLES else "F64")
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
