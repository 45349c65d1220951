"""Where compressed blocks wait until the place of each is known."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.packed import VERSION, prefix
from diffxfer.checkpoints.encodings.packing import version
from diffxfer.checkpoints.stored import StoredTensor
from diffxfer.checkpoints.writer import write_error

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from diffxfer.checkpoints.stored import Files, TensorSpec
    from diffxfer.streaming.plan import TensorTask


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
