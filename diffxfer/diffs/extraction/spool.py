"""Where compressed blocks wait until the place of each is known."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.packed import VERSION, kept, prefix
from diffxfer.checkpoints.encodings.packing import version
from diffxfer.checkpoints.stored import StoredTensor
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import OutputError

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from diffxfer.checkpoints.stored import Files, TensorSpec
    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.plan import TensorTask


SPOOL_NAME = "blocks.tmp"
"""The file's name in the partial folder."""


class Spool:
    """A file of blocks in the partial folder, in any order; use it as a context manager.

    Args:
        folder: the output folder, inside its `with` block, whose scratch file it is.

    Attributes:
        broken: whether a sync of it failed, so that earlier writes may be lost.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self.broken = False
        self._out, self._end, self._dirty = folder.out, 0, False
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(folder.partial / SPOOL_NAME, flags, 0o666)
        except OSError as exc:
            raise write_error(self._out, SPOOL_NAME, exc) from exc

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def take_up(self, end: int) -> bool:
        """Go on after the blocks of earlier runs.

        Args:
            end: where the last one ends.

        Returns:
            Whether the file is as long as that.
        """
        self._end, self._dirty = end, end > 0
        return os.fstat(self._fd).st_size >= end

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
                done = os.pwrite(self._fd, rest, at)
                at, rest = at + done, rest[done:]
        except OSError as exc:
            raise write_error(self._out, SPOOL_NAME, exc) from exc
        with self._lock:  # after the write: a sync before it would not cover the bytes
            self._dirty = True
        return start

    def sync(self) -> None:
        """Make all earlier writes durable.

        Raises:
            OSError: if this sync fails, or an earlier one failed.
        """
        with self._syncing:
            with self._lock:
                dirty, self._dirty = self._dirty, False
            try:
                if self.broken:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if dirty:
                    os.fsync(self._fd)
            except OSError:
                self.broken = True
                raise

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Read bytes that were added.

        Args:
            buffer: receives them.
            start: their offset.

        Raises:
            OutputError: if they cannot be read, or the file was cut.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], start + done)
            except OSError as exc:
                problem = f"its {SPOOL_NAME} cannot be read ({exc.strerror})"
                raise OutputError(self._out, problem, "check the disk") from exc
            if not count:
                problem = f"its {SPOOL_NAME} is shorter than it was"
                raise OutputError(self._out, problem, "run it again with --restart")
            done += count


@dataclass(frozen=True, slots=True, eq=False)
class PackedBytes(StoredTensor):
    """The bytes of a packed tensor, whose blocks wait in a file.

    Attributes:
        task: the task that computes Δ.
        packed_dtype: the dtype in which every element of Δ, or of what Δ is rounded to, is exact.
        checksum: the checksum of that in this dtype.
        lost: the number of elements that base + Δ does not give back.
        level: the level of compression.
        spool: the file.
        sizes: the size of each block.
        starts: where each block is in the file.
        error: ‖what Δ is rounded to − Δ‖₂, None if Δ is exact.
    """

    task: TensorTask
    packed_dtype: str
    checksum: str
    lost: int
    level: int
    spool: Spool
    sizes: NDArray[np.uint32]
    starts: NDArray[np.uint64]
    error: float | None = None

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
        """None of an input: what it is computed from has been read."""
        return 0

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Copy bytes: of the head, and of each block."""
        known = kept(files, self)
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
