"""Factors between their computation and the output: tensors in a temporary file without a name."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from diffxfer.checkpoints.stored import BITS, StoredTensor
from diffxfer.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from diffxfer.checkpoints.stored import Files, ShardFile, TensorSpec
    from diffxfer.diffs.lora.factorise import Matrix


@dataclass(frozen=True, slots=True)
class Held(StoredTensor):
    """A tensor in the temporary file, in float32.

    Attributes:
        fd: the file.
        start: its first byte in the file.
        digest: xxh3-128 of its bytes; the job is the same if the factors are.
    """

    fd: int
    start: int
    digest: str

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """None: it is in no file of an input."""
        return ()

    @property
    def parameters(self) -> tuple[object, ...]:
        """Its shape and digest."""
        return self.shape, self.digest

    @property
    def stored_bytes(self) -> int:
        """Its size in the temporary file."""
        return self.nbytes

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Read elements."""
        del files
        at, done = self.start + start * (BITS[self.dtype] // 8), 0
        while done < len(buffer):
            count = os.preadv(self.fd, [buffer[done:]], at + done)
            assert count, "the file is as long as it was"
            done += count


class Holder:
    """A temporary file that disappears with the process; use it as a context manager.

    Args:
        out: the output folder; the file is on the same disk.
    """

    def __init__(self, out: Path) -> None:
        folder = next(parent for parent in out.absolute().parents if parent.is_dir())
        try:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 closed by `__exit__`
                dir=folder, prefix=".diffxfer-"
            )
        except OSError as exc:
            problem = f"cannot be written ({exc.strerror or exc})"
            raise OutputError(out, problem, "choose another -o") from exc
        self._out, self._end = out, 0

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def hold(self, name: str, values: Matrix, shard: ShardFile) -> Held:
        """Write a tensor.

        Args:
            name: its name in the output.
            values: its values.
            shard: the input that it was computed from.

        Raises:
            OutputError: if it cannot be written, as on a full disk.
        """
        data = np.ascontiguousarray(values).tobytes()
        at, rest = self._end, memoryview(data)
        try:
            while rest:
                done = os.pwrite(self._file.fileno(), rest, at)
                at, rest = at + done, rest[done:]
        except OSError as exc:
            problem = f"cannot be written ({exc.strerror or exc})"
            raise OutputError(self._out, problem, "free disk space, or choose another -o") from exc
        start, self._end = self._end, self._end + len(data)
        digest = xxhash.xxh3_128_hexdigest(data)
        return Held(name, "F32", values.shape, shard, self._file.fileno(), start, digest)
