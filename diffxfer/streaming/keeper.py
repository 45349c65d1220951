"""Keeping what is done: the journal is written all the time, and the disk synced now and then."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from diffxfer.checkpoints.filesystem import sync_folder
from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.writer import write_error

if TYPE_CHECKING:
    from collections.abc import Collection
    from concurrent.futures import Future

    from diffxfer.checkpoints.shard_writer import ShardWriter
    from diffxfer.checkpoints.writer import OutputFolder

SYNC_INTERVAL_S = 15.0
"""At most so much work is lost to a power cut, and what it takes to sync it."""


class Keeper:
    """Writes the journal of a run; use it from one thread.

    Syncing takes as long as the disk takes, so a thread of its own does it.

    Args:
        folder: what is being written.
        writers: its shards.
        interval_s: seconds from the end of a sync to the next.
    """

    def __init__(
        self, folder: OutputFolder, writers: Collection[ShardWriter], interval_s: float
    ) -> None:
        self._folder = folder
        self._writers = writers
        self._interval_s = interval_s
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._sync: Future[None] | None = None
        self._synced_at = time.monotonic()

    def tick(self) -> None:
        """Write what was added to the journal; sync if it is time.

        Raises:
            OutputError: if that fails, or the last sync did.
        """
        if self._sync is not None and self._sync.done():
            self._end_sync(self._sync)
        covered = self._flush()
        if self._sync is None and time.monotonic() - self._synced_at >= self._interval_s:
            self._sync = self._pool.submit(self._run_sync, covered)

    def finish(self) -> None:
        """Write the rest, once every worker has ended without a failure.

        Raises:
            OutputError: if that fails, or a sync did.
        """
        self._pool.shutdown()
        if self._sync is not None:
            self._end_sync(self._sync)
        self._flush()

    def abandon(self) -> None:
        """Keep what can be trusted of a run that failed."""
        self._pool.shutdown()
        if any(writer.broken for writer in self._writers):
            self._folder.journal.distrust()
        with suppress(OSError):
            self._folder.journal.flush()

    def _flush(self) -> int:
        try:
            return self._folder.journal.flush()
        except OSError as exc:
            raise write_error(self._folder.out, JOURNAL_NAME, exc) from exc

    def _end_sync(self, sync: Future[None]) -> None:
        self._sync = None
        self._synced_at = time.monotonic()
        try:
            sync.result()
        except OSError as exc:
            raise write_error(self._folder.out, "", exc) from exc

    def _run_sync(self, covered: int) -> None:
        for writer in self._writers:
            writer.sync()
        sync_folder(self._folder.partial)
        self._folder.journal.mark(covered)
