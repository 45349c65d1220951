"""Failures between the client and the Hub, switched on by path."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass
class Fault:
    """A fault that affects some requests.

    Attributes:
        path: a regular expression that is searched in the path of a request.
        method: only requests of this method; None for all.
        times: the number of requests to affect, None for no limit.
        beyond: only requests for a range that begins at this byte or later.
        least: only requests for a range of at least this many bytes.
        status: answer with this instead.
        headers: of that answer.
        after: send this many bytes of the body, then close the connection.
        at_most: send this many bytes of the body, and state that this is all.
        takes: read this many bytes of the request's body, then close the connection.
        whole: send the whole file instead of the requested range.
        shifted: send a range that begins this many bytes later, and state it.
        instead: send the bytes of this file in place of the requested one.
        page: answer with this web page and status 200.
        pause_s: seconds to wait before every block of the body.
        met: the number of requests affected so far.
    """

    path: str
    method: str | None = None
    times: int | None = None
    beyond: int = 0
    least: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int | None = None
    at_most: int | None = None
    takes: int | None = None
    whole: bool = False
    shifted: int = 0
    instead: Path | None = None
    page: Path | None = None
    pause_s: float = 0.0
    met: int = 0

    def befalls(self, method: str, path: str, wanted: str) -> bool:
        """Whether it affects a request."""
        part = re.match(r"bytes=(\d+)-(\d+)", wanted)
        start, stop = (int(part[1]), int(part[2]) + 1) if part else (self.beyond, self.least)
        return (
            start >= self.beyond
            and (part is None or stop - start >= self.least)
            and (self.times is None or self.met < self.times)
            and self.method in (None, method)
            and re.search(self.path, path) is not None
        )

    def wait(self) -> None:
        """Be slow."""
        if self.pause_s:
            time.sleep(self.pause_s)


def failing(path: str, status: int = 500, *, times: int | None = None) -> Fault:
    """The server fails."""
    return Fault(path, times=times, status=status, headers={"X-Error-Message": "no luck today"})


def limited(path: str, *, retry_after_s: int = 0, times: int | None = None) -> Fault:
    """There were too many requests."""
    headers = {"Retry-After": str(retry_after_s), "X-Error-Message": "We had to rate limit you"}
    return Fault(path, times=times, status=429, headers=headers)


def cut(path: str, after: int, *, times: int | None = None) -> Fault:
    """The connection breaks in the middle of a body."""
    return Fault(path, method="GET", times=times, after=after)


def truncated(path: str, at_most: int, *, times: int | None = None) -> Fault:
    """A body is too short, and its stated length agrees with it."""
    return Fault(path, method="GET", times=times, at_most=at_most)


def cut_upload(path: str, takes: int, *, times: int | None = None) -> Fault:
    """The connection breaks in the middle of an upload."""
    return Fault(path, method="PUT", times=times, takes=takes)


def slow(path: str, pause_s: float) -> Fault:
    """Every block of a body is slow."""
    return Fault(path, pause_s=pause_s)


class Faults:
    """The faults that are switched on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: list[Fault] = []

    def on(self, fault: Fault) -> Fault:
        """Switch one on."""
        with self._lock:
            self._on.append(fault)
        return fault

    def off(self) -> None:
        """Switch all of them off."""
        with self._lock:
            self._on.clear()

    def of(self, method: str, path: str, wanted: str, *, takes: bool = False) -> Fault | None:
        """The first fault that affects a request, which is counted.

        Args:
            method: the request's.
            path: the request's.
            wanted: the range that it asks for, as the header has it.
            takes: look for one of what is sent here, not of the answer.
        """
        with self._lock:
            for fault in self._on:
                if (fault.takes is not None) is takes and fault.befalls(method, path, wanted):
                    fault.met += 1
                    return fault
        return None
