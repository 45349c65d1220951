"""Reading files on the Hub by range, without storing them.

Checkpoints are read half a MiB at a time, by several threads and mostly in file order. Such
requests are too small for HTTP. So while a file is read in order, the parts that are fetched grow
up to `MAX_PART`, and the next parts are fetched ahead. All parts together take at most `BUDGET`
bytes of memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from diffxfer.checkpoints.hub.failures import (
    PATIENCE_S,
    FalseAnswerError,
    explain,
    pause_before_retry,
)
from diffxfer.checkpoints.hub.repo_ids import HubId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from diffxfer.checkpoints.hub.repo_ids import HubFile

MIN_PART = 1 << 20
MAX_PART = 8 << 20
"""The least and the most bytes that one request fetches ahead."""

BUDGET = 128 << 20
"""The most bytes of parts in memory, for all files together."""

_AT_A_TIME = 8
_AHEAD = 2
_LEAST_AHEAD = 1 << 16
"""The bytes that are read in order before many others are fetched ahead.

Samples of a few quantised tensors are fewer, even if their scales are neighbours in the file.
"""
_EXPIRED = (400, 401, 403, 404, 410)
"""Status codes with which a CDN may refuse an expired link."""


class _Location:
    """The download link of a file, which the Hub issues and which expires."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._found: tuple[str, dict[str, str]] | None = None

    def get(self) -> tuple[str, dict[str, str]]:
        """The link, and the headers to send with it."""
        with self._lock:
            if self._found is None:
                self._found = self._ask()
            return self._found

    def forget(self) -> None:
        """Request a new link next time."""
        self._found = None

    def _ask(self) -> tuple[str, dict[str, str]]:
        file = self._file
        url = hf_hub_url(file.repo, file.name, revision=file.commit)
        found = get_hf_file_metadata(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        _refuse_another(file, found.size, found.etag)
        headers = build_hf_headers(library_name="diffxfer")
        headers["Accept-Encoding"] = "identity"
        if httpx2.URL(found.location).netloc != httpx2.URL(url).netloc:
            headers.pop("authorization", None)  # send the token to the Hub only
        return found.location, headers


class RemoteFile:
    """One file on the Hub, open for reading by several threads.

    Args:
        file: the file; its bytes are requested when they are needed.
    """

    def __init__(self, file: HubFile) -> None:
        self.file = file
        self._location = _Location(file)
        self._parts = _parts
        self._parts.enter()
        self.closed = threading.Event()

    def close(self) -> None:
        """Drop fetched parts and abort requests in progress; threads that wait for them fail."""
        self._parts.leave(self)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file.

        Args:
            buffer: the bytes to fill completely.
            offset: the first byte in the file.

        Raises:
            HubError: if they cannot be fetched.
        """
        done = 0
        while done < len(buffer):
            start, data = self._parts.get(self, offset + done, len(buffer) - done)
            skip = offset + done - start
            count = min(len(buffer) - done, len(data) - skip)
            buffer[done : done + count] = memoryview(data)[skip : skip + count]
            done += count

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes of a range, by as many requests as necessary.

        Raises:
            HubError: if they cannot be fetched.
        """
        data = bytearray()
        failures = 0
        while len(data) < stop - start:
            before = len(data)
            try:
                self._request(start, stop, data)
                failed: Exception | None = None
            except (httpx2.TransportError, FalseAnswerError, OSError) as exc:
                failed = exc
            if len(data) > before and not self.closed.is_set():
                failures = 0
                continue
            # Nothing came: wait, unless a retry is useless.
            model = HubId(self.file.repo)
            failed = failed or OSError("no data received")
            pause = pause_before_retry(failed, PATIENCE_S[min(failures, len(PATIENCE_S) - 1)])
            failures += 1
            if pause is None or failures > len(PATIENCE_S) or self.closed.wait(pause):
                raise explain(failed, model) from failed
        return bytes(data)

    def _request(self, start: int, stop: int, data: bytearray) -> None:
        """Append the bytes of one request, which may be fewer than requested."""
        url, headers = self._location.get()
        first = start + len(data)
        headers = {**headers, "Range": f"bytes={first}-{stop - 1}"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as answer:
            if answer.status_code in _EXPIRED:
                # Request a new link: if the Hub itself refuses the file, this raises its error.
                self._location.forget()
                self._location.get()
                raise httpx2.ReadError("the download link expired")
            hf_raise_for_status(answer)
            if answer.status_code == 200:  # a proxy that does not support ranges
                _refuse_another(self.file, _stated(answer.headers.get("Content-Length")), None)
                _skip(self._blocks(answer), first, stop, data)
                return
            _refuse_other_range(answer, first, self.file.size)
            for block in self._blocks(answer):
                data += block[: stop - start - len(data)]

    def _blocks(self, answer: httpx2.Response) -> Iterator[bytes]:
        # Blocks as received: with fixed-size blocks, a cut would lose the incomplete last block.
        for block in answer.iter_bytes():
            if self.closed.is_set():
                raise httpx2.ReadError("the read was cancelled")
            yield block


def _stated(length: str | None) -> int | None:
    return int(length) if length is not None and length.isdigit() else None


def _refuse_another(file: HubFile, size: int | None, etag: str | None) -> None:
    """Refuse an answer that is not the listed file."""
    if size is not None and size != file.size:
        raise FalseAnswerError(f"sent {size} bytes for {file.name}, but lists {file.size}")
    if etag is not None and len(etag) == len(file.etag) and etag != file.etag:
        raise FalseAnswerError(f"sent another version of {file.name} than it lists")


def _refuse_other_range(answer: httpx2.Response, first: int, size: int) -> None:
    """Refuse bytes of a range other than the requested one."""
    stated = answer.headers.get("Content-Range", "")
    if not stated.startswith(f"bytes {first}-") or not stated.endswith((f"/{size}", "/*")):
        raise FalseAnswerError(f"sent {stated[:80] or 'no Content-Range'!r} for another range")


def _skip(blocks: Iterable[bytes], first: int, stop: int, data: bytearray) -> None:
    """Take a range from a whole file."""
    at = 0
    for block in blocks:
        data += block[max(0, first - at) : max(0, stop - at)]
        at += len(block)
        if at >= stop:
            return


class _Part:
    """A part of a file, fetched or being fetched."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.data: Future[bytes] = Future()


class _Parts:
    """The parts of all open files, and the threads that fetch them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, int], _Part] = OrderedDict()
        self._bytes = 0
        self._files = 0
        self._pool: ThreadPoolExecutor | None = None

    def enter(self) -> None:
        """Count another open file."""
        with self._lock:
            self._files += 1
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="hub")

    def leave(self, file: RemoteFile) -> None:
        """Drop the parts of a closed file; after the last file, end the threads."""
        with self._lock:
            if file.closed.is_set():
                return
            file.closed.set()
            for key in [key for key in self._held if key[0] == id(file)]:
                self._drop(key)
            self._files -= 1
            if self._files == 0 and self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None

    def get(self, file: RemoteFile, offset: int, wanted: int) -> tuple[int, bytes]:
        """The part that contains an offset: its start and its bytes."""
        with self._lock:
            if file.closed.is_set():
                raise httpx2.ReadError("the read was cancelled")
            part = self._find(file, offset)
            before = self._find(file, offset - 1)  # None if the reader has jumped here
            if part is None:
                part = self._begin(file, offset, max(min(wanted, MAX_PART), _following(before)))
            self._held.move_to_end((id(file), part.start))
            if before is not None and before.stop - before.start >= _LEAST_AHEAD:
                self._fetch_ahead(file, part)
        try:
            return part.start, part.data.result()
        except BaseException:
            with self._lock:
                self._drop((id(file), part.start))  # so that a later read tries again
            raise

    def _find(self, file: RemoteFile, offset: int) -> _Part | None:
        return next(
            (
                part
                for (owner, _), part in reversed(self._held.items())
                if owner == id(file) and part.start <= offset < part.stop
            ),
            None,
        )

    def _fetch_ahead(self, file: RemoteFile, part: _Part) -> None:
        """Fetch the next parts ahead, each twice as large as the last, up to a limit."""
        for _ in range(_AHEAD):
            if part.stop >= file.file.size:
                return
            following = self._find(file, part.stop)
            if following is None:
                following = self._begin(file, part.stop, _following(part))
            part = following

    def _begin(self, file: RemoteFile, start: int, size: int) -> _Part:
        # Up to the next part: scales and codes of a quantised tensor are read in turns.
        later = [begin for owner, begin in self._held if owner == id(file) and begin > start]
        part = _Part(start, min(file.file.size, start + size, *later))
        self._held[id(file), start] = part
        self._bytes += part.stop - part.start
        for key in [*self._held]:
            if self._bytes <= BUDGET or key == (id(file), start):
                break
            if self._held[key].data.done():
                self._drop(key)
        assert self._pool is not None, "a file is open"
        self._pool.submit(_fill, part, file)
        return part

    def _drop(self, key: tuple[int, int]) -> None:
        part = self._held.pop(key, None)
        if part is not None:
            self._bytes -= part.stop - part.start
            part.data.cancel()


def _following(part: _Part | None) -> int:
    """The size of the part to fetch after this one: twice its size, up to a limit."""
    if part is None:
        return 0
    size = part.stop - part.start
    least = MIN_PART if size >= _LEAST_AHEAD else _LEAST_AHEAD // 2
    return max(least, min(MAX_PART, 2 * size))


def _fill(part: _Part, file: RemoteFile) -> None:
    if not part.data.set_running_or_notify_cancel():
        return
    try:
        part.data.set_result(file.fetch(part.start, part.stop))
    except BaseException as exc:
        part.data.set_exception(exc)


_parts = _Parts()
