"""Calls of the operating system that Python does not offer, each with its fallback, and locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def allocate(fd: int, size: int) -> None:
    """Reserve the whole of a new file, or at least give it its size.

    `os.posix_fallocate` is not used: where a file system cannot allocate (NFS, ZFS), glibc
    emulates it by writing every block.

    Args:
        fd: an empty file, open for writing.
        size: in bytes.

    Raises:
        OSError: ENOSPC above all.
    """
    os.ftruncate(fd, size)
    if size == 0 or not hasattr(_libc, "fallocate"):
        return
    while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders of one file system in a single step.

    Returns:
        False where the system cannot; nothing has changed then.

    Raises:
        OSError: if it can and failed.
    """
    if not hasattr(_libc, "renameat2"):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    result = _libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one))


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable, where the file system can: some network ones cannot."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def lock_folder(folder: Path) -> int:
    """Lock a folder for this process, as long as the descriptor is open that comes back.

    Raises:
        BlockingIOError: if another process has locked it.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
