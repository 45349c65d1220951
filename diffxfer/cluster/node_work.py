"""What runs on the nodes of a cluster. These functions are called by Ray, in processes of its own.

What a node sends back is bytes with a checksum. They are unpickled only by the run that started the
work, on whose cluster everything else runs as well: a cluster trusts its nodes.
"""

from __future__ import annotations

import os
import pickle
import platform
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.stored import is_unchanged
from diffxfer.errors import ClusterError, DiffxferError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile

_REPORT_INTERVAL_S = 0.5
_FIRST_ANSWER_S = 5.0
_PROBE_WAITS_S = (0.5, 1, 2)
SAME = "install the same version on both"
PACKAGES = ("diffxfer", "torch", "numba")
"""The packages whose version the bytes of a result may depend on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a piece of work ended on a node.

    Attributes:
        node: the node's name.
        data: the result, pickled; empty after a failure, or if the driver has stopped the piece.
        checksum: the xxh3-128 of these bytes.
        error: the failure, if it is a known one.
    """

    node: str
    data: bytes = b""
    checksum: str = ""
    error: DiffxferError | None = None


class Tally:
    """How much of each piece of work is done: an actor that the nodes report to.

    Its answers stop pieces: `ray.cancel` can end the whole driver, since Ray (2.60) fails a check
    if a task ends while it is cancelled.
    """

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._last: int | None = None

    def report(self, index: int, done: int) -> bool:
        """Record how much of a piece is done; returns whether the piece is to go on."""
        self._done[index] = max(done, self._done.get(index, 0))
        return self._last is None or index <= self._last

    def stop_after(self, index: int) -> None:
        """Stop the pieces after one; all of them for −1."""
        self._last = index if self._last is None else min(index, self._last)

    def take(self) -> dict[int, int]:
        """What was reported since the last call, by piece."""
        found, self._done = self._done, {}
        return found


def node_name() -> str:
    """This node's name, with the beginning of the id by which Ray knows it."""
    import ray

    return named(socket.gethostname(), ray.get_runtime_context().get_node_id())


def named(host: str, node_id: str) -> str:
    """The name of a node: its host's, and the beginning of its id, as several may share a host."""
    return f"{host} ({node_id[:8]})"


def versions() -> dict[str, str]:
    """The versions of this node's Python and of the packages that the result may depend on."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def other_version(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """How a node's versions differ from this machine's, in words; empty if they do not.

    Args:
        ours: this machine's `versions()`.
        theirs: the node's.
    """
    for package, wanted in ours.items():
        if theirs[package] != wanted:
            return f"has {package} {theirs[package]}, this machine has {wanted}"
    return ""


def unseen(probe: Path | None, token: str, inputs: Sequence[ShardFile]) -> str:
    """What a node does not see of a run's files, in words; empty if it sees all.

    Args:
        probe: a file in the output folder.
        token: what it contains.
        inputs: the files that the run reads.
    """
    if probe is not None and not _sees(probe, token):
        return f"does not see the output folder {probe.parent.parent}"
    for shard in inputs:
        if shard.away:
            continue
        try:
            same = is_unchanged(shard.path.stat(), shard.identity)
        except OSError as exc:
            return f"does not see {shard.path} ({exc.strerror})"
        if not same and shard.remote is None:
            return f"sees another file at {shard.path}"
    return ""


def _sees(probe: Path, token: str) -> bool:
    for wait_s in (0, *_PROBE_WAITS_S):
        time.sleep(wait_s)
        with suppress(OSError):
            # An NFS client asks the server again when a folder is opened, not for a known name.
            for folder in (probe.parent.parent, probe.parent):
                os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            if probe.read_text() == token:
                return True
    return False


class _Stopped(BaseException):
    """The driver does not want the piece any longer."""


class _Reporter:
    """Reports how much of a piece is done, and listens whether it is to go on."""

    def __init__(self, index: int, tally: Any) -> None:
        import ray

        self._ray: Any = ray
        self._index, self._tally = index, tally
        self._done = 0
        self.send()

    def send(self) -> None:
        self._sent_at = time.monotonic()
        self._asked = self._tally.report.remote(self._index, self._done)

    def listen(self, wait_s: float) -> None:
        answered, _ = self._ray.wait([self._asked], timeout=wait_s)
        with suppress(self._ray.exceptions.RayError):  # its node is lost: it comes back elsewhere
            if answered and not self._ray.get(self._asked):
                raise _Stopped

    def report(self, done: int) -> None:
        self._done = done
        if time.monotonic() - self._sent_at >= _REPORT_INTERVAL_S:
            self.listen(0)
            self.send()


def do_piece(
    ours: Mapping[str, str], function: Callable[..., Any], piece: Any, index: int, tally: Any
) -> Outcome:
    """Call a function with a piece of work; a failure comes back as a value.

    Args:
        ours: the versions that this node must have: it may have joined after the check.
        function: the function.
        piece: its first argument; the second reports how much is done.
        index: the piece's index.
        tally: the handle of the `Tally` actor.
    """
    problem = other_version(ours, versions())
    if problem:
        return Outcome(node_name(), error=ClusterError(f"node {node_name()}", problem, SAME))
    reporter = _Reporter(index, tally)
    try:
        reporter.listen(_FIRST_ANSWER_S)
        data = pickle.dumps(function(piece, reporter.report))
        reporter.send()
    except _Stopped:
        return Outcome(node_name())
    except DiffxferError as exc:
        return Outcome(node_name(), error=exc)
    except Exception as exc:
        traceback.print_exc(file=sys.stderr)  # it goes to the log that the message names
        problem = f"a part of the work failed there: {type(exc).__name__}: {first_line(exc)}"
        where = f"node {node_name()}"
        return Outcome(node_name(), error=ClusterError(where, problem, f"read {_log()} there"))
    return Outcome(node_name(), data, xxhash.xxh3_128_hexdigest(data))


def _log() -> str:
    """This process's log, as Ray has opened it; its name ends in the process's id otherwise."""
    with suppress(OSError):
        path = os.readlink("/proc/self/fd/2")  # noqa: PTH115 a name, not always a file's
        if path.startswith("/"):
            return path
    return f"the log that ends in -{os.getpid()}.err in Ray's session folder"
