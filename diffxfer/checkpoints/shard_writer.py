"""Writing one shard, in any order and from any thread."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from diffxfer.checkpoints.filesystem import allocate, open_regular
from diffxfer.checkpoints.writer import write_error

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.checkpoints.layout import ShardLayout
    from diffxfer.checkpoints.writer import PartialFolder


class ShardWriter:
    """A shard being written: fully allocated first, then filled in any order by any thread.

    Args:
        folder: the output folder.
        name: its file name.
        layout: its layout.
        pending: the number of writes that complete it; after the last one it is made durable.
        begun: whether an earlier run has written a part of it.

    Attributes:
        broken: whether a sync of it failed, so that earlier writes may be lost.
    """

    def __init__(
        self,
        folder: PartialFolder,
        name: str,
        layout: ShardLayout,
        pending: int,
        *,
        begun: bool = False,
    ) -> None:
        self.layout = layout
        self.broken = False
        self._folder = folder
        self._name = name
        self._pending = pending
        self._begun = begun
        # Whether it may hold data that no sync of this run covers.
        self._dirty = begun
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._fd = -1

    def __del__(self) -> None:
        self.close()

    def is_sound(self) -> bool:
        """Whether the file that an earlier run began has the right size and header."""
        try:
            fd = open_regular(self._path)
        except OSError:
            return False
        try:
            header = self.layout.header
            size = os.fstat(fd).st_size
            return size == self.layout.size and os.pread(fd, len(header), 0) == header
        except OSError:
            return False
        finally:
            os.close(fd)

    def create(self) -> None:
        """Allocate the file and write its header, unless an earlier run did.

        The file is closed again, because a large model has more shards than a process may open.

        Raises:
            OutputError: if that fails, mostly because the disk is full.
        """
        try:
            if self._begun:
                if self._pending == 0:
                    self.sync()
                return
            try:
                with self._path.open("xb", buffering=0) as file:
                    fd = file.fileno()
                    allocate(fd, self.layout.size)
                    _pwrite_all(fd, memoryview(self.layout.header), 0)
                    if self._pending == 0:
                        self._sync(fd)
            except OSError:
                with suppress(OSError):  # a shard without any data only takes up disk space
                    self._path.unlink()
                raise
        except OSError as exc:
            raise write_error(self._folder.out, self._name, exc) from exc

    def write(self, data: memoryview, offset: int, parts: int = 1) -> None:
        """Write bytes to their final place.

        Args:
            data: the bytes.
            offset: their offset in the file.
            parts: how many of the writes that complete the file this one counts for.

        Raises:
            OutputError: if that fails.
        """
        try:
            with self._lock:
                if self._fd < 0:
                    self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            _pwrite_all(self._fd, data, offset)
            with self._lock:
                # After the write: a sync before it would clear this without covering the data.
                self._dirty = True
                self._pending -= parts
                complete = self._pending == 0
            if complete:
                self.sync()
                self.close()
        except OSError as exc:
            raise write_error(self._folder.out, self._name, exc) from exc

    def sync(self) -> None:
        """Make all earlier writes durable.

        Raises:
            OSError: if this sync fails, or an earlier one failed.
        """
        with self._lock:
            if not self._dirty and not self.broken:
                return
            fd = os.dup(self._fd) if self._fd >= 0 else os.open(self._path, os.O_WRONLY)
            self._dirty = False
        try:
            self._sync(fd)
        finally:
            os.close(fd)

    def _sync(self, fd: int) -> None:
        # The system reports a failed write of pages once, then treats the pages as clean. Without
        # this lock and `broken`, a second thread's sync of the same file would seem to succeed.
        with self._syncing:
            try:
                if self.broken:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                os.fsync(fd)
            except OSError:
                self.broken = True
                raise

    def close(self) -> None:
        """Close the file, complete or not; no write may be in progress."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # whether it is complete is already known
                os.close(fd)

    @property
    def _path(self) -> Path:
        return self._folder.partial / self._name


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
