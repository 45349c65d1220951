"""Writing one shard, in any order and from any thread."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from diffxfer.checkpoints.filesystem import allocate
from diffxfer.checkpoints.writer import write_error

if TYPE_CHECKING:
    from diffxfer.checkpoints.header import ShardLayout
    from diffxfer.checkpoints.writer import OutputFolder


class ShardWriter:
    """A shard in the making: allocated whole, then filled in any order by any thread.

    Args:
        folder: what it belongs to.
        name: its file name.
        layout: its header and places.
        pending: how many writes make it complete; after the last one it is made durable.
    """

    def __init__(self, folder: OutputFolder, name: str, layout: ShardLayout, pending: int) -> None:
        self.layout = layout
        self._folder = folder
        self._name = name
        self._pending = pending
        self._lock = threading.Lock()
        self._fd = -1

    def __del__(self) -> None:
        self.close()

    def create(self) -> None:
        """Allocate the file and write its header.

        The file is closed again: a large model has more shards than a process may have open.

        Raises:
            OutputError: if it cannot be, for want of disk above all.
        """
        try:
            with (self._folder.partial / self._name).open("xb", buffering=0) as file:
                fd = file.fileno()
                allocate(fd, self.layout.size)
                _pwrite_all(fd, memoryview(self.layout.header), 0)
                if self._pending == 0:
                    os.fsync(fd)
        except OSError as exc:
            raise write_error(self._folder.out, self._name, exc) from exc

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes to their final place.

        Args:
            data: what to write.
            offset: where, in the file.

        Raises:
            OutputError: if that fails.
        """
        try:
            with self._lock:
                if self._fd < 0:
                    path = self._folder.partial / self._name
                    self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            _pwrite_all(self._fd, data, offset)
            with self._lock:
                self._pending -= 1
                complete = self._pending == 0
            if complete:
                os.fsync(self._fd)
                self.close()
        except OSError as exc:
            raise write_error(self._folder.out, self._name, exc) from exc

    def close(self) -> None:
        """Let go of the file, complete or not; no write may be under way."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # a complete file is on the disk already, another is removed
                os.close(fd)


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
