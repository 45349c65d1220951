"""Protecting completed work from a power cut: syncing the disk at intervals, in the background."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from diffxfer.checkpoints.filesystem import sync_folder
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from collections.abc import Collection
    from concurrent.futures import Future

    from diffxfer.checkpoints.writer import PartialFolder

SYNC_INTERVAL_S = 15.0
"""A power cut loses at most the work of this interval and of one sync."""


class Syncable(Protocol):
    """A file that a run writes: a `ShardWriter`, or another.

    Attributes:
        broken: whether a sync of it failed, so that earlier writes may be lost.
    """

    broken: bool

    def sync(self) -> None:
        """Make all earlier writes durable."""


class Syncer:
    """Syncs the files that a run writes; use it from one thread.

    A sync may take long, so it runs in a background thread.

    Args:
        folder: the output folder.
        writers: its files.
        interval_s: seconds from the end of a sync to the next.
    """

    def __init__(
        self, folder: PartialFolder, writers: Collection[Syncable], interval_s: float
    ) -> None:
        self._folder = folder
        self._writers = writers
        self._interval_s = interval_s
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._sync: Future[None] | None = None
        self._synced_at = time.monotonic()

    def tick(self) -> None:
        """Start a sync if the interval has passed.

        Raises:
            OutputError: if the last sync failed.
        """
        if self._sync is not None and self._sync.done():
            self._end_sync(self._sync)
        if self._sync is None and time.monotonic() - self._synced_at >= self._interval_s:
            self._sync = self._pool.submit(self._sync_and_mark, self._folder.journal.size)

    def finish(self) -> None:
        """Stop after every worker has ended without a failure.

        Raises:
            OutputError: if a sync failed.
        """
        self._pool.shutdown()
        if self._sync is not None:
            self._end_sync(self._sync)

    def abandon(self, exc: BaseException) -> None:
        """Stop after a failure, and discard records that can no longer be trusted.

        If files cannot be read or written, the disk itself may be failing or gone, so only a sync
        shows which writes it has kept.

        Args:
            exc: the failure.
        """
        self._pool.shutdown()
        journal = self._folder.journal
        try:
            if isinstance(exc, (OutputError, CheckpointError)):
                self._sync_all()
                with suppress(OSError):  # a full disk may have no space for the mark
                    journal.mark(journal.size)
        except OSError:
            journal.distrust()
        if any(writer.broken for writer in self._writers):
            journal.distrust()

    def _end_sync(self, sync: Future[None]) -> None:
        self._sync = None
        self._synced_at = time.monotonic()
        try:
            sync.result()
        except OSError as exc:
            raise write_error(self._folder.out, "", exc) from exc

    def _sync_and_mark(self, covered: int) -> None:
        self._sync_all()
        self._folder.journal.mark(covered)

    def _sync_all(self) -> None:
        for writer in self._writers:
            writer.sync()
        sync_folder(self._folder.partial)
