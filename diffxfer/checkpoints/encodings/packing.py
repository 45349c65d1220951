"""One block of a packed tensor: float32 or float64 values, compressed.

A block begins with a byte that states its form:

- 1: float32: a bit for each element, the first one in the highest bit of its byte; then the planes
  of `kernels.packing` for the elements whose bit is 1. The others are +0.0.
- 2: float64: 8 planes of bytes, the lowest byte first.
- 3 and 4: int8 and int4: codes and scales, see `rounding`. These two lose something.

Then comes one frame of zstd. A reader needs nothing else. The writer ends a block of zstd wherever
the statistics of the bytes change, so that each part has a code of its own.

If the form's highest bit is 1, the block has `exceptions`: a second frame of zstd, and its size as
a uint32 (little-endian) at the end of the block.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from diffxfer.checkpoints.encodings import exceptions
from diffxfer.checkpoints.encodings import rounding as lossy
from diffxfer.kernels.native import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.checkpoints.encodings.exceptions import Exceptions
    from diffxfer.checkpoints.encodings.rounding import Rounding

BLOCK = 1 << 18
"""Elements of a block: those of a checksum's block."""
MOST_BYTES = (9 + exceptions.MOST_BYTES) * BLOCK
"""No block is larger: compression adds less than an eighth."""
LEVELS = range(1, 20)
"""Levels of compression; the first one hardly does more than to code bytes by their frequency."""

_SINGLES, _DOUBLES = 1, 2
_WITH_EXCEPTIONS = 0x80
_SIZE = struct.Struct("<I")
_ROUNDED = {rounding.form: rounding for rounding in lossy.ROUNDINGS.values()}
_MANY_ZEROS = 0.55
"""From this share on, zeros are left out of the planes."""
_OWN_CODE = 8192
"""Elements that deserve a code of their own: its description takes up to 128 bytes."""
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
            # Matches are hardly ever found in these bytes, so do not spend time on them.
            parameters = zstandard.ZstdCompressionParameters(
                window_log=17,
                hash_log=10,
                chain_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
                strategy=zstandard.STRATEGY_FAST,
            )
        else:
            parameters = zstandard.ZstdCompressionParameters.from_level(level)
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._places = np.zeros(256, np.uint32)

    def encode(self, values: Singles) -> bytes:
        """Compress float32 values.

        Args:
            values: at most `BLOCK` of them.
        """
        whole = np.ascontiguousarray(values).view(np.uint32)
        if np.count_nonzero(whole) > len(whole) * (1 - _MANY_ZEROS):
            bits = np.full(-(-len(whole) // 8), 255, np.uint8)
        else:
            present = whole != 0
            bits, whole = np.packbits(present), whole[present]
        return bytes((_SINGLES,)) + self._compress([bits, *self._planes(whole)])

    def encode_wide(self, values: Doubles) -> bytes:
        """Compress float64 values.

        Args:
            values: at most `BLOCK` of them.
        """
        planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8).T
        return bytes((_DOUBLES,)) + self._compress(
            [np.ascontiguousarray(plane) for plane in planes]
        )

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
        return bytes((rounding.form,)) + self._compress(parts), rounded

    def _planes(self, whole: NDArray[np.uint32]) -> list[Bytes]:
        """The planes, cut where a code of its own is worth it."""
        count = len(whole)
        planes = np.empty(4 * count, np.uint8)
        addresses = [array.ctypes.data for array in (whole, planes, self._places)]
        kernel("split", ("U32", "U8", "U32"))(*addresses, count)
        cuts = list(_cuts(self._places, count))
        parts = [planes[:count]]
        for plane in planes[count:].reshape(3, count):
            # A plane of zeros takes a few bytes as it is.
            parts += np.split(plane, cuts) if plane.any() else [plane]
        return parts

    def _compress(self, parts: list[Bytes]) -> bytes:
        frame = self._compressor.compressobj(size=sum(map(len, parts)))
        made = []
        for part in parts:
            made += [frame.compress(part.data), frame.flush(_NEW_CODE)]
        return b"".join((*made, frame.flush()))


def _cuts(ends: NDArray[np.uint32], count: int) -> Iterator[int]:
    """Where to cut planes that are sorted by exponent."""
    last = 0
    for end in np.unique(ends).tolist():
        if end - last >= _OWN_CODE and count - end > 0:
            yield end
            last = end


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
    form = data[0] & ~_WITH_EXCEPTIONS if len(data) else -1
    if form == _DOUBLES:
        planes = _decompress(data[1:], 8 * count, 8 * count).reshape(8, count)
        return np.ascontiguousarray(planes.T).view(np.float64).reshape(count)
    if form in _ROUNDED:
        size = _ROUNDED[form].size(count, first, width)
        content = _decompress(data[1:], size, size)
        return lossy.decode(content, _ROUNDED[form], count, first, width)
    if form != _SINGLES:
        raise PackingError(f"expected the form 1 to 4, found {form} in {len(data):,} bytes")
    bits = -(-count // 8)
    content = _decompress(data[1:], bits, bits + 4 * count)
    present = np.unpackbits(content[:bits], count=count).view(np.bool_)
    others, expected = len(content) - bits, 4 * int(np.count_nonzero(present))
    if others != expected:
        raise PackingError(f"expected {expected:,} bytes after the bits, found {others:,}")
    joined = _join(content[bits:])
    if len(joined) == count:
        return joined.view(np.float32)
    whole = np.zeros(count, np.uint32)
    whole[present] = joined
    return whole.view(np.float32)


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
    room = len(data) - 1 - _SIZE.size
    size = _SIZE.unpack(data[-_SIZE.size :])[0] if room > 0 else 0
    if not 0 < size < room:
        raise PackingError(
            f"expected fewer than {max(room, 0):,} bytes of exceptions, found {size:,}"
        )
    end = len(data) - _SIZE.size
    return data[: end - size], data[end - size : end]


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


def _join(planes: Bytes) -> NDArray[np.uint32]:
    count = len(planes) // 4
    places, made = np.empty(256, np.uint32), np.empty(count, np.uint32)
    planes = np.ascontiguousarray(planes)
    addresses = [array.ctypes.data for array in (planes, places, made)]
    kernel("join", ("U8", "U32", "U32"))(*addresses, count)
    return made
