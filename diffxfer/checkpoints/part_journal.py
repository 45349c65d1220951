"""Journals of parts: what other processes did for a run, before its own journal has it.

Each attempt at a part has a journal of its own in the partial folder, so that two processes never
write to the same one. The run that owns the folder takes their records over. Their names begin with
the run's token: what processes of a killed run still write after the next run has begun may be in
files that the next run has replaced, so it does not count.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.journal import JOURNAL_NAME, Done, Journal, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READ_BYTES = 1 << 20


def new_part_journal(partial: Path, fingerprint: bytes, run: str, first_chunk: int) -> Journal:
    """Begin the journal of an attempt at a part.

    Args:
        partial: the partial folder.
        fingerprint: the job's fingerprint, 16 bytes.
        run: the run's token.
        first_chunk: the number of the part's first chunk.

    Raises:
        OSError: if it cannot be written.
    """
    path = partial / f"{_prefix(run, first_chunk)}{secrets.token_hex(4)}"
    return Journal(path, fingerprint, partial.stat().st_ino)


def part_journals(partial: Path, of: tuple[str, int] | None = None) -> list[Path]:
    """The journals of parts in a partial folder.

    Args:
        partial: the folder.
        of: a run's token and the first chunk of one part, to find only the journals of the attempts
            of that run at it.
    """
    prefix = f"{JOURNAL_NAME}-" if of is None else _prefix(*of)
    try:
        names = os.listdir(partial)  # noqa: PTH208 names alone
    except FileNotFoundError:
        return []
    return [partial / name for name in sorted(names) if name.startswith(prefix)]


def done_in_part(path: Path, fingerprint: bytes) -> Iterator[Done]:
    """What the journal of a part says is done and certain to be in the files.

    Args:
        path: the journal.
        fingerprint: the job's fingerprint, 16 bytes; the journal of another job has nothing.

    Yields:
        Each record, in order.
    """
    known = summarize(path)
    if known is None or known.fingerprint != fingerprint:
        return
    journal = Journal(path, fingerprint, known.inode, known)
    try:
        yield from journal.done()
    finally:
        journal.close()


def done_bytes_in_parts(partial: Path, fingerprint: bytes) -> int:
    """The bytes that the journals of parts in a folder say are read and written.

    Args:
        partial: the folder.
        fingerprint: the job's fingerprint, 16 bytes.
    """
    found = (summarize(path) for path in part_journals(partial))
    return sum(known.done_bytes for known in found if known and known.fingerprint == fingerprint)


def checksum_of(path: Path) -> str:
    """The xxh3-128 of a file, in hexadecimal.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _prefix(run: str, first_chunk: int) -> str:
    return f"{JOURNAL_NAME}-{run}-{first_chunk:012d}-"
