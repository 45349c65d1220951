"""Packed tensors: a difference, compressed block by block; each block decodes alone.

On disk a packed tensor is a U8 tensor with its own name. Its dtype and shape are in the manifest.
The bytes are a head (`HEAD`: a mark, the version of the format, the number of elements), the size
of each block as a uint32 (little-endian), and the blocks in order, see `packing`. Elements that no
difference gives back are stored beside it, see `exceptions`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffxfer.checkpoints.encodings.packing import BLOCK, MOST_BYTES, decode, decode_exceptions
from diffxfer.checkpoints.encodings.symbols import Doubles, PackingError, Singles
from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.stored import FLOATS, StoredTensor, TensorSpec
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from diffxfer.checkpoints.encodings.exceptions import Exceptions
    from diffxfer.checkpoints.stored import Files

FORMAT = "packed"
"""The name of the encoding, as users know it."""
VERSION = 1
HEAD = struct.Struct("<7sBQ")
MARK = b"dfxpack"
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_AGAIN = "make or download it again"


def prefix(elements: int, sizes: NDArray[np.uint32]) -> bytes:
    """What comes before the blocks: the head, and the size of each block.

    Args:
        elements: the number of elements of the tensor.
        sizes: the sizes of its blocks in bytes.
    """
    return HEAD.pack(MARK, VERSION, elements) + sizes.astype("<u4").tobytes()


def prefix_bytes(elements: int) -> int:
    """The size of the prefix of a tensor; the first block begins there."""
    return HEAD.size + 4 * blocks_of(elements)


def blocks_of(elements: int) -> int:
    """The number of blocks of a tensor."""
    return -(-elements // BLOCK)


def unpacked(
    on_disk: Mapping[str, TensorSpec], described: Mapping[str, tuple[str, Sequence[int]]]
) -> dict[str, StoredTensor]:
    """Replace packed tensors on disk by the tensors that they encode.

    Args:
        on_disk: the tensors of a folder as they are on disk.
        described: dtype and shape of each packed tensor, by name; not trusted.

    Raises:
        CheckpointError: if a tensor cannot be packed, or its description cannot be right.
    """
    return {
        name: packed(spec, *described[name]) if name in described else spec
        for name, spec in on_disk.items()
    }


def packed(spec: TensorSpec, dtype: str, shape: Sequence[int]) -> Packed:
    """The tensor that the bytes of a tensor encode.

    Args:
        spec: the tensor on disk.
        dtype: the dtype of the values; not trusted.
        shape: their shape; not trusted.

    Raises:
        CheckpointError: if the bytes are too few, or dtype or shape is impossible.
    """
    found = Packed(spec.name, dtype, tuple(shape), spec.shard, spec)
    if spec.dtype != "U8" or len(spec.shape) != 1:
        raise found.damaged(f"expected U8 of one dimension, found {spec.dtype} {list(spec.shape)}")
    if dtype not in FLOATS:
        raise found.damaged(f"expected a float dtype in the manifest, found {dtype!r}")
    if spec.nbytes < found.data_start:
        least = f"expected {found.data_start:,} bytes or more for {found.elements:,} elements"
        raise found.damaged(f"{least}, found {spec.nbytes:,}")
    return found


@dataclass(frozen=True, slots=True)
class Packed(StoredTensor):
    """A packed tensor.

    Attributes:
        data: the bytes.
        form: what the manifest says of them, for people; reading does not depend on it.
    """

    data: TensorSpec
    form: str = FORMAT

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The bytes."""
        return (self.data,)

    @property
    def parameters(self) -> tuple[object, ...]:
        """The shape: the bytes state only the number of elements."""
        return FORMAT, self.shape

    @property
    def encoding(self) -> str:
        """The form."""
        return self.form

    @property
    def data_start(self) -> int:
        """Where the first block begins."""
        return prefix_bytes(self.elements)

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode the blocks that the elements are in.

        Raises:
            CheckpointError: if the bytes are not those of a packed tensor.
        """
        made = np.frombuffer(buffer, _NUMPY[self.dtype])
        done = 0
        while done < len(made):
            block, inside = divmod(start + done, BLOCK)
            values = self._block(files, block)[inside : inside + len(made) - done]
            made[done : done + len(values)] = values
            done += len(values)

    def exceptions(self, files: Files, start: int, count: int) -> Iterator[tuple[int, Exceptions]]:
        """Decode the exceptions of the blocks that the elements are in."""
        stop = start + count
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            found = self._exceptions(files, block)
            if found is not None:
                first = max(start, block * BLOCK)
                last = min(stop, (block + 1) * BLOCK)
                yield first - start, found.among(first - block * BLOCK, last - first)

    def damaged(self, problem: str, block: int | None = None) -> CheckpointError:
        """The error for bytes that are not a packed tensor.

        Args:
            problem: what was expected, and what was found.
            block: the block.
        """
        where = "" if block is None else f", block {block:,}"
        text = f"packed tensor {short(self.name)}{where}: {problem}"
        return CheckpointError(self.shard.path, text, _AGAIN)

    def _block(self, files: Files, block: int) -> NDArray[np.generic]:
        """A block in the dtype of the tensor; the last one is kept."""
        known = kept(files, self)
        if known.get("block") != block:
            known["block"] = None
            known["values"] = self._decode(files, block)
            known["block"] = block
        values: NDArray[np.generic] = known["values"]
        return values

    def _decode(self, files: Files, block: int) -> NDArray[np.generic]:
        data, count = self._bytes_of(files, block)
        width = self.shape[-1] if self.shape else 1
        try:
            return _as_dtype(decode(data, count, block * BLOCK % width, width), self.dtype)
        except PackingError as exc:
            raise self.damaged(str(exc), block) from exc

    def _exceptions(self, files: Files, block: int) -> Exceptions | None:
        """The exceptions of a block; those of the last one are kept."""
        known = kept(files, self)
        if known.get("exceptions", (-1,))[0] != block:
            data, count = self._bytes_of(files, block)
            try:
                known["exceptions"] = block, decode_exceptions(data, count)
            except PackingError as exc:
                raise self.damaged(str(exc), block) from exc
        found: Exceptions | None = known["exceptions"][1]
        return found

    def _bytes_of(self, files: Files, block: int) -> tuple[memoryview, int]:
        """The bytes of a block, and its number of elements."""
        ends = kept(files, self).get("ends")
        if ends is None:
            ends = kept(files, self)["ends"] = self._ends(files)
        begin, end = int(ends[block - 1]) if block else 0, int(ends[block])
        data = files.read(self.data, self.data_start + begin, end - begin)
        return data, min(BLOCK, self.elements - block * BLOCK)

    def _ends(self, files: Files) -> NDArray[np.int64]:
        """Where each block ends, counted from the first one."""
        start = self.data_start
        mark, version, elements = HEAD.unpack(bytes(files.read(self.data, 0, HEAD.size)))
        if mark != MARK:
            raise self.damaged(f"expected it to begin with {MARK!r}, found {mark!r}")
        if version != VERSION:
            found = self.damaged(f"expected version {VERSION} of the format, found {version}")
            found.remedy = "update diffxfer: pipx upgrade diffxfer"
            raise found
        if elements != self.elements:
            raise self.damaged(f"expected {self.elements:,} elements, found {elements:,}")
        table = files.read(self.data, HEAD.size, start - HEAD.size)
        sizes = np.frombuffer(table, "<u4").astype(np.int64)
        ends = np.cumsum(sizes)
        expected, stated = self.data.nbytes - start, int(ends[-1])
        if stated != expected:
            raise self.damaged(f"expected blocks of {expected:,} bytes in all, found {stated:,}")
        if int(sizes.max()) > MOST_BYTES:
            block = int(sizes.argmax())
            problem = f"expected at most {MOST_BYTES:,} bytes, found {int(sizes[block]):,}"
            raise self.damaged(problem, block)
        return ends


def _as_dtype(values: Singles | Doubles, dtype: str) -> NDArray[np.generic]:
    """The same values in another dtype, as the dtype of `_NUMPY`.

    Raises:
        PackingError: if the dtype cannot hold them.
    """
    if dtype == "F64":
        return values.astype(np.float64)
    if values.dtype != np.float32:
        raise PackingError(f"expected values of {dtype}, found F64")
    if dtype == "F32":
        return values
    if dtype == "BF16":
        whole = values.view(np.uint32)
        if (whole & np.uint32(0xFFFF)).any():
            raise PackingError("expected values of BF16, found F32")
        return (whole >> np.uint32(16)).astype(np.uint16)
    with np.errstate(all="ignore"):
        halves = values.astype(np.float16)
        back = halves.astype(np.float32)
    if not np.array_equal(back.view(np.uint32), values.view(np.uint32)):
        raise PackingError("expected values of F16, found F32")
    return halves


def kept(files: Files, stored: StoredTensor) -> dict[str, Any]:
    """What a thread has found out about a tensor, kept until another tensor asks.

    Args:
        files: of the thread.
        stored: the tensor.

    Returns:
        A dictionary to read and to add to.
    """
    return files.derived(stored, lambda _: dict[str, Any]())
