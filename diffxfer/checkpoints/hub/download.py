"""Downloading files into the Hub's cache, several at a time, with huggingface_hub."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, hf_hub_download

from diffxfer.checkpoints.hub.failures import FalseAnswerError, persistently
from diffxfer.checkpoints.hub.repo_ids import HubId
from diffxfer.checkpoints.output_place import free_bytes, gigabytes, same_disk
from diffxfer.errors import DiskSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.checkpoints.hub.repo_ids import HubFile

_AT_A_TIME = 8
_LOOK_S = 0.1
_BLOCK = 1 << 20
_SHA256_DIGITS = 64
"""The etag of a large file is its SHA-256; that of a small file is git's hash."""
_PATIENCE_AT_THE_END_S = 2.0


def refuse_small_cache(files: Sequence[HubFile], out: Path | None, needed: int) -> None:
    """Refuse downloads that do not fit on the cache's disk.

    Args:
        files: the files to download.
        out: the output folder made from them, or None.
        needed: bytes that the output still needs, possibly on the same disk.

    Raises:
        DiskSpaceError: if too few bytes are free.
    """
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    free = free_bytes(cache / "models")
    beside = out is not None and same_disk(cache, out)
    wanted = sum(file.size for file in files) + (needed if beside else 0)
    if wanted > free:
        what = "the downloads and the output" if beside else "the downloads"
        problem = f"{what} need {gigabytes(wanted)}, but only {gigabytes(free)} are free"
        remedy = "free disk space, or set HF_HOME to a folder on a larger disk"
        remedy += "" if out is None else ", or give --stream, which stores only the output"
        raise DiskSpaceError(cache, problem, remedy)


def download(files: Sequence[HubFile], progress: Callable[[int, int], None] | None = None) -> None:
    """Download files that are not in the cache yet.

    A file appears in the cache only when it is complete. After an interruption, complete files are
    not downloaded again.

    Args:
        files: files of any number of models.
        progress: called from this thread with the bytes present and the total bytes.

    Raises:
        HubError: if one cannot be downloaded.
    """
    meter = _Meter(files)
    workers = [
        threading.Thread(target=meter.work, daemon=True) for _ in range(min(_AT_A_TIME, len(files)))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(_LOOK_S)
                if progress is not None:
                    progress(meter.done(), meter.total)
    finally:
        meter.stop = True
        end = time.monotonic() + _PATIENCE_AT_THE_END_S
        for worker in workers:
            # A thread that hangs on the network ends with the process.
            worker.join(max(0.0, end - time.monotonic()))
    if meter.failure is not None:
        raise meter.failure


class _StoppedError(Exception):
    """The download was stopped: another file failed, or the user interrupted it."""


class _Meter:
    """The files to fetch, and the bytes fetched so far."""

    def __init__(self, files: Sequence[HubFile]) -> None:
        self._waiting = deque(files)
        self._came = [0] * len(files)
        self._places = {id(file): place for place, file in enumerate(files)}
        self.total = sum(file.size for file in files)
        self.failure: Exception | None = None
        self.stop = False

    def done(self) -> int:
        """The bytes fetched so far."""
        return min(self.total, sum(self._came))

    def count(self, file: HubFile, came: int) -> None:
        """Record how many bytes of a file are present."""
        if self.stop:
            raise _StoppedError
        self._came[self._places[id(file)]] = came

    def work(self) -> None:
        """Fetch files one after the other."""
        while self._waiting and not self.stop:
            try:
                file = self._waiting.popleft()
                self._fetch(file)
                self.count(file, file.size)
            except (IndexError, _StoppedError):
                return
            except Exception as exc:
                self.failure = self.failure or exc
                self.stop = True

    def _fetch(self, file: HubFile) -> None:
        bar = type("Bar", (_Bar,), {"meter": self, "file": file})

        def fetch() -> None:
            came = hf_hub_download(
                file.repo, file.name, revision=file.commit, tqdm_class=bar, library_name="diffxfer"
            )
            self._check(file, Path(came))

        persistently(fetch, HubId(file.repo))

    def _check(self, file: HubFile, came: Path) -> None:
        """Check that it is the requested file; huggingface_hub only checks sizes.

        Xet checks files during transfer, but nothing shows whether a file came by Xet.
        """
        if len(file.etag) != _SHA256_DIGITS:
            return
        digest = hashlib.sha256()
        with came.open("rb") as content:
            while block := content.read(_BLOCK):
                if self.stop:
                    # Without its link the file does not count as checked. The data stays, and the
                    # next run checks it instead of downloading it again.
                    came.unlink()
                    raise _StoppedError
                digest.update(block)
        if digest.hexdigest() != file.etag:
            came.resolve().unlink()
            came.unlink(missing_ok=True)
            raise FalseAnswerError(f"sent different content for {file.name} than it lists")


class _Bar:
    """The part of tqdm's interface that huggingface_hub uses for a progress bar."""

    meter: _Meter
    file: HubFile

    def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
        self._came = initial
        self.meter.count(self.file, initial)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: float | None = 1) -> None:
        """Count more bytes; negative if the download starts again."""
        self._came += int(count or 0)
        self.meter.count(self.file, self._came)

    def update_transfer(self, count: float | None = 1) -> None:
        """Do nothing: `update` counts these bytes."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Do nothing: the text is not shown."""

    set_transfer_postfix_str = set_postfix_str

    def close(self) -> None:
        """Do nothing: there is nothing to close."""
