"""Shards that are open for reading.

No file is memory-mapped: bytes are read into buffers that the caller reuses, so memory use does
not grow with the size of a model, a tensor or a shard.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import BITS, Files, ShardFile, StoredTensor, is_unchanged
from diffxfer.errors import CheckpointError, HeaderError, InputChangedError, ShardIndexError

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.checkpoints.hub.ranges import RemoteFile

_UNCHANGED = "run it again, and do not change the inputs while it runs"


def open_regular(path: Path) -> int:
    """Open a file for reading.

    Args:
        path: the file; links are followed.

    Raises:
        ShardIndexError: if it is missing.
        HeaderError: if it cannot be opened, or is a FIFO, a device or a folder.
    """
    try:
        # Check the kind before opening, since opening a device may have an effect. O_NONBLOCK,
        # since a FIFO may have replaced the file meanwhile and opening it would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _not_regular(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        what = "is a broken link" if path.is_symlink() else "is missing"
        raise ShardIndexError(path, what, "download the checkpoint again") from exc
    except OSError as exc:
        problem = f"cannot be opened ({exc.strerror})"
        raise HeaderError(path, problem, "check that it can be read") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(path)
    return fd


def _not_regular(path: Path) -> HeaderError:
    return HeaderError(path, "is not a regular file", "replace it with the shard itself")


class OpenShard:
    """A shard that is open for reading; closed when its last reference is dropped.

    Args:
        shard: the file whose header was read; it is read from the Hub if it is not local.

    Raises:
        InputChangedError: if the file has changed since.
    """

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        self._file: _LocalFile | RemoteFile | None = None
        if shard.remote is not None and shard.away:
            from diffxfer.checkpoints.hub.ranges import RemoteFile

            self._file = RemoteFile(shard.remote)
        else:
            self._file = _LocalFile(shard)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it now."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def abandon(self) -> None:
        """Abort requests to the Hub in progress, if any; threads that wait for them then fail."""
        if not isinstance(self._file, _LocalFile):  # another file could get its descriptor number
            self.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file.

        Args:
            buffer: the bytes to fill completely.
            offset: the first byte in the file.

        Raises:
            InputChangedError: if the file ends before the buffer is full.
            CheckpointError: if it cannot be read from disk.
            HubError: if it cannot be fetched from the Hub.
        """
        assert self._file is not None, "it is open"
        self._file.read_into(buffer, offset)


class _LocalFile:
    """An open local shard."""

    def __init__(self, shard: ShardFile) -> None:
        self._path = shard.path
        try:
            self._fd = open_regular(shard.path)
        except ShardIndexError as exc:
            raise InputChangedError(shard.path, "vanished while it was read", _UNCHANGED) from exc
        status = os.fstat(self._fd)
        # A file from the Hub is identified by its name in the cache, not by its mtime.
        same = (
            status.st_size == shard.size if shard.remote else is_unchanged(status, shard.identity)
        )
        if not same:
            self.close()
            raise InputChangedError(shard.path, "changed while it was read", _UNCHANGED)

    def close(self) -> None:
        os.close(self._fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as exc:
                problem = f"cannot be read at byte {offset + done} ({exc.strerror})"
                raise CheckpointError(self._path, problem, "check the disk") from exc
            if count == 0:
                raise InputChangedError(self._path, "was truncated while it was read", _UNCHANGED)
            done += count


def check_unchanged(shard: ShardFile) -> None:
    """Check, by path, that a shard is still the file whose header was read.

    Raises:
        InputChangedError: if it is missing or has changed.
    """
    if shard.remote is not None:
        return  # a commit never changes
    try:
        status = shard.path.stat()
    except OSError as exc:
        raise InputChangedError(shard.path, "vanished while it was read", _UNCHANGED) from exc
    if not is_unchanged(status, shard.identity):
        raise InputChangedError(shard.path, "changed while it was read", _UNCHANGED)


def one_at_a_time() -> Files:
    """Files of which only the one read last is open."""
    last: list[OpenShard] = []

    def open_shard(shard: ShardFile) -> OpenShard:
        if not last or last[0].shard is not shard:
            last[:] = [OpenShard(shard)]
        return last[0]

    return Files(open_shard)


def same_values(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; stops at the first difference.

    Args:
        left: the first tensor.
        right: the second tensor.

    Raises:
        CheckpointError: if one cannot be read, or has changed.
    """
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    files = one_at_a_time(), one_at_a_time()
    size = BITS[left.dtype] // 8
    step = 1 << 17
    # Compare whole bytearrays: comparing memoryviews goes byte by byte, a hundred times slower.
    # After a short last step, both buffers still end with the same bytes of the previous step.
    buffers = bytearray(step * size), bytearray(step * size)
    for done in range(0, left.elements, step):
        count = min(step, left.elements - done) * size
        left.read(files[0], done, memoryview(buffers[0])[:count])
        right.read(files[1], done, memoryview(buffers[1])[:count])
        if buffers[0] != buffers[1]:
            return False
    return True
