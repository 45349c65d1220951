"""Functions of the operating system that Python lacks, each with a fallback."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_TMPFS = 0x01021994
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def allocate(fd: int, size: int) -> None:
    """Reserve the whole of a new file, or at least give it its size.

    `os.posix_fallocate` is not used: if a file system cannot allocate (NFS, ZFS), glibc emulates
    it by writing every block. On a disk, reserving is instant and keeps a file contiguous. In
    memory (tmpfs) it took as long as all the work, so nothing is reserved there.

    Args:
        fd: an empty file, open for writing.
        size: in bytes.

    Raises:
        OSError: if it fails, mostly with ENOSPC.
    """
    os.ftruncate(fd, size)
    if size == 0 or not hasattr(_libc, "fallocate") or _in_memory(fd):
        return
    while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _in_memory(fd: int) -> bool:
    """Whether a file is on tmpfs; Linux only."""
    status = (ctypes.c_long * 64)()  # a `struct statfs`, which begins with `f_type`, is smaller
    return _libc.fstatfs(fd, status) == 0 and status[0] == _TMPFS


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders of one file system in a single step.

    Returns:
        False if the system cannot; nothing has changed then.

    Raises:
        OSError: if the system can but failed.
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
    """Make the entries of a folder durable, except on network file systems that cannot."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Make a folder and everything in it durable."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def boot_id() -> bytes:
    """An id of the machine's current boot; empty if it is not known."""
    try:
        return _BOOT_ID.read_bytes().strip()
    except OSError:
        return b""


def open_regular(path: Path) -> int:
    """Open a regular file for reading; refuses links, FIFOs and devices.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    return fd


def lock_folder(folder: Path) -> int:
    """Lock a folder against other runs, until the returned descriptor is closed.

    Raises:
        BlockingIOError: if another run holds the lock.
        OSError: if it is not a folder, or cannot be locked.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, there = os.fstat(fd), os.stat(folder)  # noqa: PTH116 beside `fstat`
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise BlockingIOError(errno.EAGAIN, "another run took its place", str(folder))
    except OSError:
        os.close(fd)
        raise
    return fd
