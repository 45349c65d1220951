"""Elements that base + Δ does not give back, stored with finetuned's own bits.

No float64 difference leads from −0.0 to −0.0, from 2¹⁰⁰ to 1, or to the payload of a NaN. For such
elements a block of a packed tensor has, besides Δ, a list of exceptions:

- a byte that states finetuned's dtype, as its place in `DTYPES`;
- a bit for each element of the block, 1 for an exception, the first one in the highest bit;
- the bits of each exception in order, as planes of bytes, the lowest byte first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_UNSIGNED: dict[str, np.dtype[np.unsignedinteger]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
    "F64": np.dtype("<u8"),
}
DTYPES = tuple(_UNSIGNED)
"""The dtypes of finetuned; part of the format."""
MOST_BYTES = 9
"""No list takes more bytes for each element of its block, but for the byte at the start."""


class ExceptionsError(ValueError):
    """Bytes that are no list of exceptions; the text says what was expected and found."""


@dataclass(frozen=True, slots=True, eq=False)
class Exceptions:
    """Elements that base + Δ does not give back.

    Attributes:
        dtype: finetuned's dtype.
        places: which elements they are, ascending, of shape `(exceptions,)`.
        bits: finetuned's bits of each as an unsigned integer, of the same shape.
    """

    dtype: str
    places: NDArray[np.int64]
    bits: NDArray[np.unsignedinteger]

    def among(self, start: int, count: int) -> Exceptions:
        """Those among some elements, counted from the first of these.

        Args:
            start: the first element.
            count: the number of elements.
        """
        low, high = np.searchsorted(self.places, (start, start + count)).tolist()
        return Exceptions(self.dtype, self.places[low:high] - start, self.bits[low:high])

    def put_into(self, data: memoryview) -> None:
        """Replace the elements by finetuned's.

        Args:
            data: elements in finetuned's dtype, which the places count.
        """
        as_bits(data, self.dtype)[self.places] = self.bits


def as_bits(data: memoryview, dtype: str) -> NDArray[np.unsignedinteger]:
    """View bytes as the bits of elements.

    Args:
        data: the bytes.
        dtype: as safetensors names it.
    """
    found: NDArray[np.unsignedinteger] = np.frombuffer(data, _UNSIGNED[dtype])
    return found


def joined(parts: list[Exceptions]) -> Exceptions:
    """The exceptions of several parts of a block, in order.

    Args:
        parts: one or more, of one dtype.
    """
    places = np.concatenate([part.places for part in parts])
    bits = np.concatenate([part.bits for part in parts])
    order = np.argsort(places)
    return Exceptions(parts[0].dtype, places[order], bits[order])


def pack(found: Exceptions, count: int) -> bytes:
    """The bytes of a list, not compressed.

    Args:
        found: the exceptions of a block.
        count: the number of elements of the block.
    """
    marks = np.zeros(count, np.bool_)
    marks[found.places] = True
    planes = np.ascontiguousarray(found.bits).view(np.uint8).reshape(len(found.bits), -1).T
    return bytes((DTYPES.index(found.dtype),)) + np.packbits(marks).tobytes() + planes.tobytes()


def unpack(data: NDArray[np.uint8], count: int) -> Exceptions:
    """The exceptions in a list.

    Args:
        data: its bytes, not trusted, at least a byte and a bit for each element.
        count: the number of elements of the block.

    Raises:
        ExceptionsError: if they are not a list for so many elements.
    """
    start = 1 + -(-count // 8)
    if data[0] >= len(DTYPES):
        most = len(DTYPES) - 1
        raise ExceptionsError(f"expected a dtype of exceptions from 0 to {most}, found {data[0]}")
    dtype = DTYPES[data[0]]
    places = np.flatnonzero(np.unpackbits(data[1:start], count=count))
    kind = _UNSIGNED[dtype]
    expected, rest = len(places) * kind.itemsize, len(data) - start
    if rest != expected:
        raise ExceptionsError(f"expected {expected:,} bytes of exceptions, found {rest:,}")
    planes = data[start:].reshape(kind.itemsize, len(places))
    bits = np.ascontiguousarray(planes.T).reshape(-1).view(kind)
    return Exceptions(dtype, places, bits)
