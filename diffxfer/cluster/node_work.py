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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.stored import is_unchanged
from diffxfer.errors import ClusterError, DiffxferError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile

_REPORT_INTERVAL_S = 0.5
PACKAGES = ("diffxfer", "torch", "numba")
"""The packages whose version the bytes of a result may depend on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a piece of work ended on a node.

    Attributes:
        node: the node's name.
        data: the result, pickled; empty after a failure.
        checksum: the xxh3-128 of these bytes.
        error: the failure, if it is a known one.
    """

    node: str
    data: bytes = b""
    checksum: str = ""
    error: DiffxferError | None = None


class Tally:
    """How much of each piece of work is done: an actor that the nodes report to."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def report(self, index: int, done: int) -> None:
        """Record how much of a piece is done."""
        self._done[index] = max(done, self._done.get(index, 0))

    def total(self) -> int:
        """The sum over all pieces."""
        return sum(self._done.values())


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


def unseen(probe: Path | None, token: str, inputs: Sequence[ShardFile]) -> str:
    """What a node does not see of a run's files, in words; empty if it sees all.

    Args:
        probe: a file in the output folder.
        token: what it contains.
        inputs: the files that the run reads.
    """
    if probe is not None:
        try:
            seen = probe.read_text() == token
        except OSError:
            seen = False
        if not seen:
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


def do_piece(function: Callable[..., Any], piece: Any, index: int, tally: Any) -> Outcome:
    """Call a function with a piece of work; a failure comes back as a value.

    Args:
        function: the function.
        piece: its first argument; the second reports how much is done.
        index: the piece's index.
        tally: the handle of the `Tally` actor.
    """
    reported = time.monotonic() - _REPORT_INTERVAL_S

    def report(done: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_INTERVAL_S:
            reported = time.monotonic()
            tally.report.remote(index, done)

    try:
        data = pickle.dumps(function(piece, report))
    except DiffxferError as exc:
        return Outcome(node_name(), error=exc)
    except Exception as exc:
        traceback.print_exc(file=sys.stderr)  # it goes to the log that the message names
        problem = f"a part of the work failed there: {type(exc).__name__}: {first_line(exc)}"
        return Outcome(node_name(), error=ClusterError(node_name(), problem, f"read {_log()}"))
    return Outcome(node_name(), data, xxhash.xxh3_128_hexdigest(data))


def _log() -> str:
    """Where this process's log is, in words."""
    import ray

    context = ray.get_runtime_context()
    folder = "/tmp/ray/session_latest/logs"
    return f"worker-{context.get_worker_id()}-*-{os.getpid()}.err in {folder} on that node"
