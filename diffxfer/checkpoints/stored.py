"""Stored tensors: what a task reads, in whatever form its values are on disk.

Matching, the plan, the engine and the manifest see a name, a dtype, a shape and the number of bytes
to read. How the values are stored is known only to the class: a plain array in one file
(`TensorSpec`), or an encoding with several parts (`encodings`).
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from diffxfer.checkpoints.shared import Shared

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.encodings.exceptions import Exceptions
    from diffxfer.checkpoints.hub.repo_ids import HubFile

_AT_LEAST = 1 << 20
T = TypeVar("T")

_DTYPES = """
    U64:64 I64:64 F64:64 C64:64 F32:32 U32:32 I32:32 BF16:16 F16:16 U16:16 I16:16
    F8_E5M2FNUZ:8 F8_E4M3FNUZ:8 F8_E8M0:8 F8_E4M3:8 F8_E5M2:8 I8:8 U8:8
    F6_E3M2:6 F6_E2M3:6 F4:4 BOOL:8
"""
BITS: Mapping[str, int] = {
    name: int(bits) for name, _, bits in (word.partition(":") for word in _DTYPES.split())
}
"""Bits per element by dtype name, in the order in which `save_file` ranks dtypes."""

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
"""The dtypes that take part in arithmetic; all others are kept as they are."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file as it was when its header was read.

    Attributes:
        path: its path, links not followed.
        size: of the whole file, in bytes.
        identity: device, inode, size and mtime in ns; it changes when the content changes.
        header_hash: xxh3-128 of the header, in hexadecimal.
        remote: the file on the Hub, downloaded or not; None for a file in a folder.
    """

    path: Path
    size: int
    identity: tuple[int, int, int, int]
    header_hash: str
    remote: HubFile | None = None

    @property
    def away(self) -> bool:
        """Whether it is only on the Hub, not downloaded."""
        return self.remote is not None and not self.remote.here


def stat_identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """The fields of a file's status that change when its content changes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_unchanged(status: os.stat_result, identity: tuple[int, int, int, int]) -> bool:
    """Whether a file's status is that of the file which had an identity.

    Another node, or the next boot, may know the file system under another device number, and then
    the file under another inode: its size and its mtime to the nanosecond decide there.

    Args:
        status: the status of the file at the same path.
        identity: what `stat_identity` gave.
    """
    now = stat_identity(status)
    return now == identity or (now[0] != identity[0] and now[2:] == identity[2:])


@dataclass(frozen=True, slots=True)
class StoredTensor(ABC):
    """A tensor whose values can be read in part.

    Attributes:
        name: its name in the model.
        dtype: the dtype of the values that `read` gives, as safetensors names it, such as
            ``"BF16"``.
        shape: one size per dimension; ``()`` is a scalar.
        shard: the file that contains it, or its first part.
        source: what it comes from, for messages; empty if its role says it.
    """

    source: ClassVar[str] = ""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: ShardFile

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors on disk that it is made of."""

    @abstractmethod
    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Read or decode consecutive elements, in row-major order.

        The values do not depend on how the elements are divided between calls.

        Args:
            files: opens the files, and lends memory for encoded parts.
            start: the first element.
            buffer: receives the values in `dtype`; its size says how many.

        Raises:
            CheckpointError: if a part cannot be read, or has changed.
            HubError: if a part cannot be fetched from the Hub.
        """

    @property
    def written_dtype(self) -> str:
        """The dtype in which a graft or a diff vector stores it, unless the user names another."""
        return self.dtype

    @property
    def encoding(self) -> str:
        """How its values are encoded, in words; empty if they are not."""
        return ""

    @property
    def elements(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""
        return self.elements * BITS[self.dtype] // 8

    @property
    def stored_bytes(self) -> int:
        """The size of its parts on disk, in bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parameters(self) -> tuple[object, ...]:
        """What its values depend on besides its parts, as values with a `repr`."""
        return ()

    def minus(self, other: StoredTensor) -> StoredTensor | None:
        """The difference to another tensor if it is stored, and need not be computed; else None.

        Args:
            other: the other tensor, of the same shape.
        """
        del other
        return None

    def transposed(self) -> StoredTensor | None:
        """The same matrices with rows and columns exchanged, if they are stored so; else None."""
        return None

    def exceptions(self, files: Files, start: int, count: int) -> Iterable[tuple[int, Exceptions]]:
        """For a difference, the elements among some that base + Δ does not give back.

        Args:
            files: opens the files, and lends memory for encoded parts.
            start: the first element.
            count: the number of elements.

        Returns:
            Exceptions, each with the place among these elements that it counts from.

        Raises:
            CheckpointError: if a part cannot be read, or has changed.
        """
        del files, start, count
        return ()

    def bytes_to_read(self, count: int) -> int:
        """The bytes read from disk for some of its elements, to estimate work.

        Args:
            count: the number of elements.
        """
        return self.stored_bytes * count // max(self.elements, 1)

    def span(self, start: int, count: int) -> tuple[int, int] | None:
        """The byte range in `shard` that contains the values as they are; None if it is encoded.

        Ranges that are adjacent are read at once.

        Args:
            start: the first element.
            count: the number of elements.
        """
        del start, count
        return None


@dataclass(frozen=True, slots=True)
class TensorSpec(StoredTensor):
    """A tensor in a safetensors file: the plain kind of stored tensor.

    Attributes:
        start: its first byte in the file.
    """

    start: int

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Itself."""
        return (self,)

    @property
    def stored_bytes(self) -> int:
        """Its size in the file, in bytes."""
        return self.nbytes

    def span(self, start: int, count: int) -> tuple[int, int]:
        """The byte range of some elements in the file."""
        size = BITS[self.dtype] // 8
        return self.start + start * size, self.start + (start + count) * size

    def bytes_to_read(self, count: int) -> int:
        """The size of some of its elements in the file, in bytes."""
        return count * BITS[self.dtype] // 8

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Read elements into a buffer."""
        at = self.start + start * (BITS[self.dtype] // 8)
        files.open(self.shard).read_into(buffer, at)


class Readable(Protocol):
    """An open file."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the bytes at an offset."""


class Files:
    """What one thread needs to read stored tensors: open shards, and memory for encoded parts.

    Args:
        open_shard: opens a shard, or returns it if it is open.
        shared: what the threads of a run find out together; None if there is one thread.
    """

    def __init__(
        self, open_shard: Callable[[ShardFile], Readable], shared: Shared | None = None
    ) -> None:
        self.open = open_shard
        self.shared = shared or Shared()
        self._memory: dict[int, memoryview] = {}
        self._read: dict[int, tuple[StoredTensor, int, int]] = {}
        self._derived: tuple[StoredTensor, Any] | None = None

    def derived(self, stored: StoredTensor, make: Callable[[Files], T]) -> T:
        """What is derived once from all of a tensor, kept until another tensor asks.

        Args:
            stored: the tensor.
            make: derives it, and may use any memory.
        """
        if self._derived is None or self._derived[0] is not stored:
            self._derived = stored, make(self)
        found: T = self._derived[1]
        return found

    def memory(self, size: int, slot: int) -> memoryview:
        """Memory that is reused.

        Args:
            size: its size in bytes.
            slot: which memory.

        Returns:
            The memory, valid until the next call with this slot.
        """
        memory = self._memory.get(slot)
        if memory is None or len(memory) < size:
            memory = self._memory[slot] = memoryview(mmap.mmap(-1, max(size, _AT_LEAST)))
        self._read.pop(slot, None)
        return memory[:size]

    def read(self, part: StoredTensor, start: int, count: int, slot: int = 0) -> memoryview:
        """Read elements of a tensor into memory that is reused, unless it already has them.

        Args:
            part: a tensor on disk, or one that is computed.
            start: the first element.
            count: the number of elements.
            slot: which memory: an encoding with two parts uses two slots.

        Returns:
            The bytes, valid until the next call with this slot.

        Raises:
            CheckpointError: if it cannot be read, or has changed.
            HubError: if it cannot be fetched from the Hub.
        """
        size = count * BITS[part.dtype] // 8
        if self._read.get(slot) == (part, start, count):
            return self._memory[slot][:size]
        memory = self.memory(size, slot)
        part.read(self, start, memory)
        self._read[slot] = part, start, count
        return memory
