"""Bringing files into the Hub's cache, several at a time, by huggingface_hub itself."""

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
"""The hash of a large file is its SHA-256, that of a small one git's."""
_PATIENCE_AT_THE_END_S = 2.0


def refuse_small_cache(files: Sequence[HubFile], out: Path | None, needed: int) -> None:
    """Refuse downloads that the cache's disk has no room for.

    Args:
        files: what is to be downloaded.
        out: the folder that is made of them, None for none.
        needed: how many more bytes that takes, which may be of the same disk.

    Raises:
        DiskSpaceError: if too few bytes are free.
    """
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    free = free_bytes(cache / "models")
    beside = out is not None and same_disk(cache, out)
    wanted = sum(file.size for file in files) + (needed if beside else 0)
    if wanted > free:
        what = "the downloads and the output" if beside else "the downloads"
        problem = f"{what} need {gigabytes(wanted)}, and {gigabytes(free)} are free there"
        remedy = "free some disk, or set HF_HOME to a larger one"
        remedy += "" if out is None else ", or give --stream, which stores nothing but the output"
        raise DiskSpaceError(cache, problem, remedy)


def download(files: Sequence[HubFile], progress: Callable[[int, int], None] | None = None) -> None:
    """Download files that are not in the cache yet.

    Each is whole in the cache or not there at all. After an interruption, those that are there are
    not fetched again.

    Args:
        files: of any number of models.
        progress: called from this thread with the bytes that are there and the bytes in all.

    Raises:
        HubError: if one cannot be had.
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
            # A thread that hangs in the network ends with the process.
            worker.join(max(0.0, end - time.monotonic()))
    if meter.failure is not None:
        raise meter.failure


class _StoppedError(Exception):
    """Another file could not be had, or the user has had enough."""


class _Meter:
    """What is to be fetched, and how much of it has come."""

    def __init__(self, files: Sequence[HubFile]) -> None:
        self._waiting = deque(files)
        self._came = [0] * len(files)
        self._places = {id(file): place for place, file in enumerate(files)}
        self.total = sum(file.size for file in files)
        self.failure: Exception | None = None
        self.stop = False

    def done(self) -> int:
        """The bytes that have come."""
        return min(self.total, sum(self._came))

    def count(self, file: HubFile, came: int) -> None:
        """Take down how much of a file is there."""
        if self.stop:
            raise _StoppedError
        self._came[self._places[id(file)]] = came

    def work(self) -> None:
        """Fetch one file after the other."""
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
        """Make sure that it is the file that was asked for; huggingface_hub looks at sizes alone.

        What came by Xet was checked on the way, but that cannot be told.
        """
        if len(file.etag) != _SHA256_DIGITS:
            return
        digest = hashlib.sha256()
        with came.open("rb") as content:
            while block := content.read(_BLOCK):
                if self.stop:
                    # Without its link it is not taken for one that was checked. What it links to
                    # stays, and the next run checks that instead of downloading it again.
                    came.unlink()
                    raise _StoppedError
                digest.update(block)
        if digest.hexdigest() != file.etag:
            came.resolve().unlink()
            came.unlink(missing_ok=True)
            raise FalseAnswerError(f"sent another content for {file.name} than the one it lists")


class _Bar:
    """What huggingface_hub takes for a progress bar; it asks for as much of tqdm as is here."""

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
        """More bytes came; or less than was thought, where it begins again."""
        self._came += int(count or 0)
        self.meter.count(self.file, self._came)

    def update_transfer(self, count: float | None = 1) -> None:
        """Bytes came over the network: `update` counts them."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Nobody reads it."""

    set_transfer_postfix_str = set_postfix_str

    def close(self) -> None:
        """Nothing is open."""
