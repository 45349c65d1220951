"""What can go wrong on the way to the Hub and back, switched on by path."""

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
    """Something that befalls requests.

    Attributes:
        path: a regular expression that is searched in the path of a request.
        method: which requests it befalls, None for all.
        times: how many, None for all of them.
        beyond: only those that ask for a range from this byte on or later.
        least: only those that ask for a range of so many bytes or more.
        status: answer with this instead.
        headers: of that answer.
        after: send so many bytes of the body, then cut the connection.
        at_most: send so many bytes of the body, and state that this is all.
        takes: take so many bytes of what is sent here, then cut the connection.
        whole: send the whole file where a part of it was asked for.
        shifted: send a part so many bytes further on, and say so.
        instead: send the bytes of this file, as if they were those of the one asked for.
        page: answer with this web page instead, as if all were well.
        pause_s: wait so long before every block of the body.
        met: how many requests it has befallen.
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
        """Whether it is a request's turn."""
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
    """A body is shorter than it should be, and nothing else seems wrong."""
    return Fault(path, method="GET", times=times, at_most=at_most)


def cut_upload(path: str, takes: int, *, times: int | None = None) -> Fault:
    """The connection breaks in the middle of what is sent to the server."""
    return Fault(path, method="PUT", times=times, takes=takes)


def slow(path: str, pause_s: float) -> Fault:
    """Every block of a body takes its time."""
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
        """The first one that befalls a request, which is counted.

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
