"""Packing Δ while it is computed: blocks are compressed as they come, and wait in a file.

The size of a packed tensor is known only when all of its blocks are compressed, and the place of
each tensor depends on those before it. So the blocks wait in a temporary file, in any order, and a
second run copies them to their places.
"""

from __future__ import annotations

import os
import tempfile
import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from diffxfer.checkpoints.encodings.packed import VERSION, blocks_of, prefix
from diffxfer.checkpoints.encodings.packing import BLOCK, BlockEncoder, version
from diffxfer.checkpoints.stored import StoredTensor
from diffxfer.checkpoints.writer import write_error
from diffxfer.kernels.native import kernel
from diffxfer.streaming.checksum import block_digests, combine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from diffxfer.checkpoints.encodings.packing import Singles
    from diffxfer.checkpoints.stored import Files, TensorSpec
    from diffxfer.streaming.plan import Plan, TensorTask

_ORDER = ("BF16", "F16", "F32", "F64")
"""Dtypes, the narrower ones first."""


class Spool:
    """A temporary file that disappears with the process; use it as a context manager.

    Args:
        out: the output folder; the file is on the same disk.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._end, self._lock = out, 0, threading.Lock()
        folder = next(parent for parent in out.absolute().parents if parent.is_dir())
        try:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 closed by `__exit__`
                dir=folder, prefix=".diffxfer-"
            )
        except OSError as exc:
            raise write_error(out, "temporary file", exc) from exc

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, data: bytes) -> int:
        """Write bytes; returns their offset. Any thread may call it.

        Args:
            data: the bytes.

        Raises:
            OutputError: if that fails, as on a full disk.
        """
        with self._lock:
            start = at = self._end
            self._end += len(data)
        rest = memoryview(data)
        try:
            while rest:
                done = os.pwrite(self._file.fileno(), rest, at)
                at, rest = at + done, rest[done:]
        except OSError as exc:
            raise write_error(self._out, "temporary file", exc) from exc
        return start

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Read bytes that were added.

        Args:
            buffer: receives them.
            start: their offset.
        """
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            assert count, "the file is as long as it was"
            done += count


@dataclass(frozen=True, slots=True, eq=False)
class PackedBytes(StoredTensor):
    """The bytes of a packed tensor, whose blocks wait in a file.

    Attributes:
        task: the task that computes Δ.
        packed_dtype: the dtype in which every element of Δ is exact.
        checksum: the checksum of Δ in this dtype.
        level: the level of compression.
        spool: the file.
        sizes: the size of each block.
        starts: where each block is in the file.
    """

    task: TensorTask
    packed_dtype: str
    checksum: str
    level: int
    spool: Spool
    sizes: NDArray[np.uint32]
    starts: NDArray[np.uint64]

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The parts of the inputs that Δ is computed from."""
        return tuple(part for stored in self.task.inputs for part in stored.parts)

    @property
    def parameters(self) -> tuple[object, ...]:
        """What the bytes depend on besides the inputs."""
        inputs = tuple(stored.parameters for stored in self.task.inputs)
        runs = tuple((run.kind.value, run.start, run.count, run.rows) for run in self.task.runs)
        return VERSION, version(), self.level, self.packed_dtype, self.checksum, runs, inputs

    @property
    def stored_bytes(self) -> int:
        """Its size in the temporary file."""
        return self.nbytes

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Copy bytes: of the head, and of each block."""
        known = files.kept(self)
        if not known:
            known["head"] = prefix(self.task.elements, self.sizes)
            sizes = self.sizes.astype(np.int64)
            known["ends"] = np.cumsum(np.concatenate(([len(known["head"])], sizes)))
        head, ends = known["head"], known["ends"]
        done = 0
        while done < len(buffer):
            at = start + done
            if at < len(head):
                part = head[at : at + len(buffer) - done]
                buffer[done : done + len(part)] = part
                done += len(part)
                continue
            block = int(np.searchsorted(ends, at, side="right")) - 1
            count = min(int(ends[block + 1]) - at, len(buffer) - done)
            inside = at - int(ends[block])
            self.spool.read_into(buffer[done : done + count], int(self.starts[block]) + inside)
            done += count


@dataclass(slots=True)
class _Tensor:
    """A tensor whose blocks are being compressed."""

    task: TensorTask
    sizes: NDArray[np.uint32]
    starts: NDArray[np.uint64]
    missing: int
    digests: dict[str, dict[int, bytes]] = field(default_factory=dict)
    dtype: str = "F64"
    checksum: str = ""


class Packer:
    """Compresses the output of a plan of float64 tensors.

    Args:
        plan: the plan; every tensor that it writes is float64.
        spool: where blocks wait.
        level: the level of compression.

    Attributes:
        sinks: what takes the output, by shard.
    """

    def __init__(self, plan: Plan, spool: Spool, level: int) -> None:
        self._spool, self._level = spool, level
        self._lock, self._own = threading.Lock(), threading.local()
        by_shard: dict[str, list[_Tensor]] = {name: [] for name in plan.layouts}
        for task in plan.tasks:
            if task.shard is not None:
                assert task.dtype == "F64"
                by_shard[task.shard].append(_begin(task))
        self._tensors = [tensor for found in by_shard.values() for tensor in found]
        self.sinks = {name: _Sink(self, found) for name, found in by_shard.items()}

    def packed(self) -> list[PackedBytes]:
        """Every tensor, packed; call it after the run."""
        made = []
        for tensor in self._tensors:
            assert tensor.missing == 0, "the plan has not run to its end"
            size = len(prefix(tensor.task.elements, tensor.sizes)) + int(tensor.sizes.sum())
            made.append(
                PackedBytes(
                    *(tensor.task.name, "U8", (size,), tensor.task.inputs[0].shard, tensor.task),
                    *(tensor.dtype, tensor.checksum, self._level, self._spool),
                    *(tensor.sizes, tensor.starts),
                )
            )
        return made

    def add(self, tensor: _Tensor, block: int, data: memoryview) -> None:
        """Compress a block.

        Args:
            tensor: its tensor.
            block: its number in the tensor.
            data: its values in float64.
        """
        values = np.frombuffer(data, np.float64)
        encoder, singles = self._mine()
        singles = singles[: len(values)]
        addresses = values.ctypes.data, singles.ctypes.data
        found = kernel("narrow", ("F64", "F32"))(*addresses, len(values))
        wide = bool(found & 1)
        packed = encoder.encode(values if wide else singles)
        start = self._spool.add(packed)
        possible = tuple(tensor.digests)  # a dtype that is gone does not come back
        digests = {"F64": block_digests(data, 8)}
        if not wide:
            digests |= _narrow_digests(singles, possible, is_bfloat16=not found & 2)
        with self._lock:
            tensor.sizes[block], tensor.starts[block] = len(packed), start
            for dtype in tuple(tensor.digests):
                if dtype in digests:
                    tensor.digests[dtype][block] = digests[dtype]
                else:
                    del tensor.digests[dtype]
            tensor.missing -= 1
            if tensor.missing == 0:
                _complete(tensor)

    def _mine(self) -> tuple[BlockEncoder, Singles]:
        """This thread's encoder, and its memory for a block."""
        known = getattr(self._own, "known", None)
        if known is None:
            known = self._own.known = BlockEncoder(self._level), np.empty(BLOCK, np.float32)
        return cast("tuple[BlockEncoder, Singles]", known)


def _begin(task: TensorTask) -> _Tensor:
    blocks = blocks_of(task.elements)
    sizes, starts = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint64)
    tensor = _Tensor(task, sizes, starts, blocks, {dtype: {} for dtype in _ORDER})
    if not blocks:
        _complete(tensor)
    return tensor


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
            same = small.astype(np.float32) == singles
        if (same | np.isnan(singles)).all():
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
