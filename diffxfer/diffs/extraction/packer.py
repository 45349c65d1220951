"""Packing Δ while it is computed: blocks are compressed as they come, and wait in a file.

The size of a packed tensor is known only when all of its blocks are compressed, and the place of
each tensor depends on those before it. So the blocks wait in a temporary file, in any order, and a
second run copies them to their places. What is known of each block is noted in the journal, so
that a run that was cut off packs only the rest.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING, cast

import numpy as np

from diffxfer.checkpoints.encodings.exceptions import joined
from diffxfer.checkpoints.encodings.packed import blocks_of, prefix_bytes
from diffxfer.checkpoints.encodings.packing import BLOCK, BlockEncoder
from diffxfer.diffs.extraction.rounded import rounded, suits
from diffxfer.diffs.extraction.spool import PackedBytes
from diffxfer.kernels.native import kernel
from diffxfer.streaming.checksum import block_digests, combine
from diffxfer.streaming.statistics import exact_sum, norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from diffxfer.checkpoints.encodings.exceptions import Exceptions
    from diffxfer.checkpoints.encodings.rounding import Rounding
    from diffxfer.checkpoints.encodings.symbols import Singles
    from diffxfer.diffs.extraction.spool import Spool
    from diffxfer.streaming.plan import Chunk, Plan, TensorTask
    from diffxfer.streaming.statistics import ChunkResult

_ORDER = ("BF16", "F16", "F32", "F64")
"""Dtypes, the narrower ones first."""
_NOTE = Struct("<QIIB?d")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Block:
    """What is known of a packed block.

    Attributes:
        start: where it is in the file.
        size: its size in bytes.
        exceptions: the number of its exceptions.
        digests: the digest of its values in each dtype that can hold them.
        square: the squared error of its values, None if they are exact.
    """

    start: int
    size: int
    exceptions: int
    digests: dict[str, bytes]
    square: float | None

    def pack(self) -> bytes:
        """The same as bytes."""
        found = [dtype in self.digests for dtype in _ORDER]
        held = sum(bit << place for place, bit in enumerate(found))
        counts = self.start, self.size, self.exceptions, held
        head = _NOTE.pack(*counts, self.square is not None, self.square or 0.0)
        return b"".join((head, *(self.digests[dtype] for dtype in _ORDER if dtype in self.digests)))

    @staticmethod
    def unpack(data: bytes) -> _Block:
        """What `pack` packed."""
        start, size, exceptions, held, rounded, square = _NOTE.unpack_from(data)
        dtypes = [dtype for place, dtype in enumerate(_ORDER) if held >> place & 1]
        begins = range(_NOTE.size, len(data), _DIGEST_BYTES)
        digests = {
            dtype: data[at : at + _DIGEST_BYTES] for dtype, at in zip(dtypes, begins, strict=True)
        }
        return _Block(start, size, exceptions, digests, square if rounded else None)


@dataclass(slots=True)
class _Tensor:
    """A tensor whose blocks are being compressed; `index` is that of its task."""

    index: int
    task: TensorTask
    sizes: NDArray[np.uint32]
    starts: NDArray[np.uint64]
    missing: int
    digests: dict[str, dict[int, bytes]] = field(default_factory=dict)
    dtype: str = "F64"
    checksum: str = ""
    exceptions: int = 0
    rounding: Rounding | None = None
    squares: list[float] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """‖what Δ is rounded to − Δ‖₂, None if Δ is exact."""
        return None if self.rounding is None else norm(exact_sum(self.squares))


class Packer:
    """Compresses the output of a plan of float64 tensors.

    Args:
        plan: the plan; every tensor that it writes is float64.
        spool: where blocks wait.
        level: the level of compression.
        rounding: a lossy form for tensors that it suits, None to pack every tensor exactly.

    Attributes:
        sinks: what takes the output, by shard.
        end: where the last block that an earlier run packed ends in the spool.
    """

    def __init__(
        self, plan: Plan, spool: Spool, level: int, rounding: Rounding | None = None
    ) -> None:
        self._spool, self._level, self._rounding = spool, level, rounding
        self._lock, self._own = threading.Lock(), threading.local()
        self._exceptions: dict[tuple[int, int], Exceptions] = {}
        self._notes: dict[tuple[int, int], bytes] = {}
        self.end = 0
        by_shard: dict[str, list[_Tensor]] = {name: [] for name in plan.layouts}
        for index, task in enumerate(plan.tasks):
            if task.shard is not None:
                assert task.dtype == "F64"
                by_shard[task.shard].append(_begin(index, task, rounding))
        self._tensors = [tensor for found in by_shard.values() for tensor in found]
        self._by_task = {tensor.index: tensor for tensor in self._tensors}
        self.sinks = {name: _Sink(self, found) for name, found in by_shard.items()}

    def packed(self) -> list[PackedBytes]:
        """Every tensor, packed; call it after the run."""
        return [self._packed(tensor) for tensor in self._tensors]

    def _packed(self, tensor: _Tensor) -> PackedBytes:
        assert tensor.missing == 0, "the plan has not run to its end"
        size = prefix_bytes(tensor.task.elements) + int(tensor.sizes.sum())
        return PackedBytes(
            name=tensor.task.name,
            dtype="U8",
            shape=(size,),
            shard=tensor.task.inputs[0].shard,
            task=tensor.task,
            packed_dtype=tensor.dtype,
            checksum=tensor.checksum,
            lost=tensor.exceptions,
            level=self._level,
            spool=self._spool,
            sizes=tensor.sizes,
            starts=tensor.starts,
            error=tensor.error,
        )

    def observe(self, chunk: Chunk, result: ChunkResult) -> None:
        """Keep the exceptions of a block until its values come.

        Args:
            chunk: the block.
            result: its result.
        """
        if result.exceptions:
            found = joined(list(result.exceptions))
            with self._lock:
                self._exceptions[chunk.task, chunk.start // BLOCK] = found

    def add(self, tensor: _Tensor, block: int, data: memoryview) -> None:
        """Compress a block.

        Args:
            tensor: its tensor.
            block: its number in the tensor.
            data: its values in float64.
        """
        exact = np.frombuffer(data, np.float64)
        encoder, singles = self._mine()
        singles = singles[: len(exact)]
        made = None
        if tensor.rounding is not None:
            made = rounded(encoder, tensor.rounding, tensor.task, block, exact)
        values = exact if made is None else made[1]
        addresses = values.ctypes.data, singles.ctypes.data
        found = kernel("narrow", ("F64", "F32"))(*addresses, len(values))
        # Exact blocks of a lossy diff vector are planes of float64, so that its reader is simple.
        wide = bool(found & 1) or (made is None and self._rounding is not None)
        if made is not None:
            packed = made[0]
        elif self._rounding is not None:
            packed = encoder.encode_planes(values)
        else:
            packed = encoder.encode(values if wide else singles)
        with self._lock:
            exceptions = self._exceptions.pop((tensor.index, block), None)
        if made is not None:
            exceptions = None  # what is rounded does not give finetuned back anyway
        if exceptions is not None:
            packed = encoder.add_exceptions(packed, exceptions, len(values))
        possible = tuple(tensor.digests)  # a dtype that is gone does not come back
        digests = {"F64": block_digests(values.data.cast("B"), 8)}
        if not wide:
            digests |= _narrow_digests(singles, possible, is_bfloat16=not found & 2)
        done = _Block(
            start=self._spool.add(packed),
            size=len(packed),
            exceptions=0 if exceptions is None else len(exceptions.places),
            digests=digests,
            square=None if made is None else float(np.square(values - exact).sum()),
        )
        with self._lock:
            self._notes[tensor.index, block] = done.pack()
            _take(tensor, block, done)

    def note(self, chunk: Chunk) -> bytes:
        """What to record of a block that is packed; empty if its tensor is not written."""
        with self._lock:
            return self._notes.pop((chunk.task, chunk.start // BLOCK), b"")

    def recall(self, task: int, start: int, note: bytes) -> None:
        """Take up a block that an earlier run has packed."""
        if note:
            done = _Block.unpack(note)
            self.end = max(self.end, done.start + done.size)
            _take(self._by_task[task], start // BLOCK, done)

    def _mine(self) -> tuple[BlockEncoder, Singles]:
        """This thread's encoder, and its memory for a block."""
        known = getattr(self._own, "known", None)
        if known is None:
            known = self._own.known = BlockEncoder(self._level), np.empty(BLOCK, np.float32)
        return cast("tuple[BlockEncoder, Singles]", known)


def _begin(index: int, task: TensorTask, rounding: Rounding | None) -> _Tensor:
    blocks = blocks_of(task.elements)
    sizes, starts = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint64)
    tensor = _Tensor(index, task, sizes, starts, blocks, {dtype: {} for dtype in _ORDER})
    if rounding is not None and suits(task):
        tensor.rounding = rounding
    if not blocks:
        _complete(tensor)
    return tensor


def _take(tensor: _Tensor, block: int, done: _Block) -> None:
    """Add what is known of a block to what is known of its tensor."""
    tensor.sizes[block], tensor.starts[block] = done.size, done.start
    tensor.exceptions += done.exceptions
    tensor.squares += [] if done.square is None else [done.square]
    for dtype in tuple(tensor.digests):
        if dtype in done.digests:
            tensor.digests[dtype][block] = done.digests[dtype]
        else:
            del tensor.digests[dtype]
    tensor.missing -= 1
    if tensor.missing == 0:
        _complete(tensor)


def _complete(tensor: _Tensor) -> None:
    """Choose the narrowest dtype that is exact, finetuned's own one of two that are as narrow."""
    own = tensor.task.inputs[0].dtype
    order = (own, *_ORDER) if own in _ORDER[:2] else _ORDER
    tensor.dtype = next(dtype for dtype in order if dtype in tensor.digests)
    tensor.checksum = combine(tensor.digests[tensor.dtype]).hex()
    tensor.digests.clear()


def _narrow_digests(
    singles: Singles, possible: Sequence[str], *, is_bfloat16: bool
) -> dict[str, bytes]:
    """The digests of float32 values in the possible dtypes that can hold them."""
    found = {"F32": block_digests(singles.data.cast("B"), 4)}
    if "BF16" in possible and is_bfloat16:
        halves = (singles.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        found["BF16"] = block_digests(halves.data.cast("B"), 2)
    if "F16" in possible:
        with np.errstate(all="ignore"):
            small = singles.astype(np.float16)
            back = small.astype(np.float32)
        if np.array_equal(back.view(np.uint32), singles.view(np.uint32)):  # the payload of NaN too
            found["F16"] = block_digests(small.view(np.uint16).data.cast("B"), 2)
    return found


class _Sink:
    """Takes the output of a shard.

    Args:
        packer: compresses it.
        tensors: the shard's tensors, in the order of their places.
    """

    def __init__(self, packer: Packer, tensors: Sequence[_Tensor]) -> None:
        self._packer = packer
        # An empty tensor has the place of the one after it, and no bytes.
        self._tensors = [tensor for tensor in tensors if tensor.task.elements]
        self._starts = [tensor.task.start for tensor in self._tensors]

    def write(self, data: memoryview, offset: int, parts: int = 1) -> None:
        """Compress the blocks of consecutive tensors."""
        del parts
        while len(data):
            tensor = self._tensors[bisect_right(self._starts, offset) - 1]
            first = (offset - tensor.task.start) // 8
            size = min(BLOCK, tensor.task.elements - first) * 8
            self._packer.add(tensor, first // BLOCK, data[:size])
            data, offset = data[size:], offset + size

    def close(self) -> None:
        """Nothing to release."""
