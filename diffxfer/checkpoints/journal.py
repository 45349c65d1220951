"""The journal of a run: which parts of the work are done, so that the next run can resume.

It is an append-only file in the partial folder: a head, then records, each with a checksum. If a
kill or a power cut leaves an incomplete record, the journal ends at the last complete one.

    head     magic, the job's fingerprint, the folder's inode
    BEGIN    a run began: the total number of bytes, and the boot that it ran under
    DONE     a part's number, the bytes it moved, its results
    SYNCED   everything recorded before this offset of the journal is durable

A write that has returned survives the end of its process, so within one boot every DONE counts.
After a power cut only the DONE records that a SYNCED covers count.
"""

from __future__ import annotations

import os
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from diffxfer.checkpoints.filesystem import boot_id, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

JOURNAL_NAME = "diffxfer.journal"

_MAGIC = b"dxfrjnl1"
_HEAD = struct.Struct("<8s16sQ")
_RECORD = struct.Struct("<BxxxIQQ")
_SUM = struct.Struct("<Q")
_FIRST = _HEAD.size + _SUM.size
_BEGIN, _DONE, _SYNCED = 1, 2, 3
_LONGEST = 1 << 26
_READ_BYTES = 1 << 16


class Done(NamedTuple):
    """A part of the work that is done.

    Attributes:
        number: its number.
        moved: how many bytes it read and wrote.
        payload: its results.
    """

    number: int
    moved: int
    payload: bytes


class _Record(NamedTuple):
    kind: int
    done: Done
    end: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The summary of a journal.

    Attributes:
        fingerprint: the job's fingerprint.
        inode: the inode of the folder that it belongs to.
        done_bytes: bytes read and written, by trusted records.
        total_bytes: bytes to read and write in total.
        trusted: the offset where trusted records end.
        synced: the offset where durable records end.
    """

    fingerprint: bytes
    inode: int
    done_bytes: int
    total_bytes: int
    trusted: int
    synced: int


def is_journal(path: Path) -> bool:
    """Whether a file is a journal of diffxfer."""
    try:
        fd = open_regular(path)
    except OSError:
        return False
    try:
        return os.pread(fd, len(_MAGIC), 0) == _MAGIC
    finally:
        os.close(fd)


def is_stillborn(path: Path) -> bool:
    """Whether a file is too short for a journal's head: its run was cut off as it began."""
    try:
        return not path.is_symlink() and path.is_file() and path.stat().st_size < _FIRST
    except OSError:
        return False


def summarize(path: Path) -> Summary | None:
    """The summary of a journal; None if there is no readable one."""
    try:
        fd = open_regular(path)
    except OSError:
        return None
    try:
        head = os.pread(fd, _FIRST, 0)
        if len(head) < _FIRST or _sum(head[: _HEAD.size]) != head[_HEAD.size :]:
            return None
        magic, fingerprint, inode = _HEAD.unpack_from(head)
        if magic != _MAGIC:
            return None
        return _summarize(fd, fingerprint, inode)
    finally:
        os.close(fd)


def _summarize(fd: int, fingerprint: bytes, inode: int) -> Summary:
    end, synced, total, boot = _FIRST, _FIRST, 0, b""
    for record in _records(fd, fingerprint):
        end = record.end
        if record.kind == _BEGIN:
            total, boot = record.done.number, record.done.payload
        elif record.kind == _SYNCED:
            synced = record.done.number
    trusted = end if boot and boot == boot_id() else synced
    moved = sum(
        record.done.moved for record in _records(fd, fingerprint, trusted) if record.kind == _DONE
    )
    return Summary(fingerprint, inode, moved, total, trusted, synced)


def _records(fd: int, fingerprint: bytes, stop: int | None = None) -> Iterator[_Record]:
    """Every complete record, up to the first incomplete or invalid one."""
    with open(os.dup(fd), "rb", buffering=_READ_BYTES) as file:  # noqa: PTH123 no path
        file.seek(_FIRST)
        at = _FIRST
        while stop is None or at < stop:
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                return
            kind, length, number, moved = _RECORD.unpack(head)
            if kind not in (_BEGIN, _DONE, _SYNCED) or length > _LONGEST:
                return
            payload = file.read(length)
            # The sum covers the fingerprint: the disk may return blocks of another job's journal.
            if file.read(_SUM.size) != _sum(fingerprint, head, payload):
                return
            at += _RECORD.size + length + _SUM.size
            yield _Record(kind, Done(number, moved, payload), at)


def _sum(*parts: bytes) -> bytes:
    return _SUM.pack(xxhash.xxh3_64_intdigest(b"".join(parts)))


class Journal:
    """A journal open for writing; failures raise `OSError`.

    Args:
        path: the journal's path.
        fingerprint: the job's fingerprint, 16 bytes.
        inode: the inode of the folder that it belongs to.
        known: the summary of an existing journal, None to begin a new one.
    """

    def __init__(
        self, path: Path, fingerprint: bytes, inode: int, known: Summary | None = None
    ) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self._writing = threading.Lock()
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags | (0 if known else os.O_CREAT | os.O_EXCL), 0o666)
        self._size = known.trusted if known else _FIRST
        self._synced = known.synced if known else _FIRST
        try:
            if known is None:
                head = _HEAD.pack(_MAGIC, fingerprint, inode)
                self._write(head + _sum(head), 0)
                os.fsync(self._fd)
        except OSError:
            self.close()
            raise

    def __del__(self) -> None:
        self.close()

    def done(self) -> Iterator[Done]:
        """The parts that earlier runs did, in order."""
        for kind, done, _ in _records(self._fd, self.fingerprint, self._size):
            if kind == _DONE:
                yield done

    def forget(self, first: int = 0) -> None:
        """Discard what is recorded of some parts, and everything after the first such record.

        Args:
            first: the parts from this number on; all of them by default.
        """
        size = _FIRST
        for kind, done, end in _records(self._fd, self.fingerprint, self._size):
            if kind == _DONE and done.number >= first:
                break
            size = end
        self._size, self._synced = size, min(self._synced, size)

    def begin(self, total_bytes: int) -> None:
        """Cut off untrusted records and record that a run begins.

        Args:
            total_bytes: how many bytes the whole work moves.
        """
        with self._writing:
            self._cut(self._size)
            self._append(self._record(_BEGIN, total_bytes, 0, boot_id()))

    def add(self, parts: Iterable[Done]) -> None:
        """Record that parts of the work are done.

        Args:
            parts: the parts, with their results.
        """
        records = b"".join([self._record(_DONE, *part) for part in parts])
        with self._writing:
            self._append(records)

    @property
    def size(self) -> int:
        """The offset of its end, for `mark`."""
        return self._size

    def mark(self, covered: int) -> None:
        """Record durably that everything recorded before an offset is durable.

        Args:
            covered: the journal's size before everything was synced.
        """
        with self._writing:
            self._append(self._record(_SYNCED, covered, 0, b""))
            self._synced = covered
        os.fsync(self._fd)

    def distrust(self) -> None:
        """Discard records that may not be durable: after a failed sync, data may be lost."""
        with self._writing:
            try:
                self._cut(self._synced)
                os.fsync(self._fd)
            except OSError:
                with suppress(OSError):  # without a journal the folder's data cannot be resumed
                    self.path.unlink()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _record(self, kind: int, number: int, moved: int, payload: bytes) -> bytes:
        head = _RECORD.pack(kind, len(payload), number, moved)
        return head + payload + _sum(self.fingerprint, head, payload)

    def _cut(self, size: int) -> None:
        """Truncate the journal at an offset, and record again what a sync covered."""
        os.ftruncate(self._fd, size)
        self._size = size
        if self._synced > _FIRST:
            self._append(self._record(_SYNCED, self._synced, 0, b""))

    def _append(self, data: bytes) -> None:
        try:
            self._write(data, self._size)
        except OSError:
            with suppress(OSError):  # if this fails too, the torn record ends the journal
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count
