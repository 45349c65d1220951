"""A Ray cluster that does the work of a run."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from diffxfer.checkpoints.writer import write_error
from diffxfer.cluster.node_work import Tally, do_piece, named, unseen, versions
from diffxfer.errors import ClusterError, first_line, listed
from diffxfer.streaming.parts import PART_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from diffxfer.checkpoints.stored import ShardFile

T = TypeVar("T")
R = TypeVar("R")

PROBE_NAME = "diffxfer.probe"
_POLL_S = 0.3
_CANCEL_S = 20.0
_QUEUED_PER_PLACE = 3
"""Pieces handed to Ray for each that can run at once: a trillion parameters have hundreds."""
_RETRIES = 5
_MOST_THREADS = 8


class RayCluster:
    """A connection to a Ray cluster; use it as a context manager.

    Args:
        address: of the cluster's head, as `ray.init` takes it; by default what the environment
            variable RAY_ADDRESS says, else a cluster of this machine alone is started and stopped.
        part_bytes: the bytes that a part of a plan reads and writes, about.

    Raises:
        ClusterError: if Ray is not installed, the cluster cannot be reached, or one of its nodes
            has another version of diffxfer, torch, numba or Python.
    """

    def __init__(self, address: str | None = None, *, part_bytes: int = PART_BYTES) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.part_bytes = part_bytes
        self._ours = False

    def __enter__(self) -> RayCluster:
        try:
            import ray
        except ImportError as exc:
            remedy = "install it: pip install 'diffxfer[ray]'"
            raise ClusterError("--ray", "needs Ray, which is not installed", remedy) from exc
        self._ray: Any = ray  # most of its interface is not typed
        if not ray.is_initialized():
            self._connect()
        try:
            self._check_versions()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            self._ours = False
            self._ray.shutdown()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Its own warnings, one a second while nobody answers, would hide the error.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
        local: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
        try:
            self._ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        except Exception as exc:  # Ray raises many kinds, down to RuntimeError and ValueError
            problem = f"no cluster answers there ({first_line(exc)})"
            remedy = "check that it runs: ray status"
            raise ClusterError(f"--ray {self.address}", problem, remedy) from exc
        self._ours = True

    @property
    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive."""
        return [node for node in self._ray.nodes() if node["Alive"]]

    def description(self) -> str:
        """The nodes, in words: what a command says before it begins."""
        nodes = self._nodes
        count = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
        gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
        hosts = sorted({node["NodeManagerHostname"] for node in nodes})
        more = f", {gpus} GPUs" if gpus else ""
        return f"on Ray: {len(nodes)} nodes ({listed(hosts)}), {count} processors{more}"

    def _check_versions(self) -> None:
        ours = versions()
        for name, theirs in self._on_every_node(versions):
            for package, version in ours.items():
                if theirs[package] != version:
                    problem = f"has {package} {theirs[package]}, this machine has {version}"
                    raise ClusterError(f"node {name}", problem, "install the same version on both")

    def check_folders(self, partial: Path | None, inputs: Sequence[ShardFile]) -> None:
        """Refuse nodes that do not see the files of a run.

        Args:
            partial: the partial folder; None if nothing is written.
            inputs: the files that are read.

        Raises:
            ClusterError: for the first one, by name.
        """
        probe = partial / PROBE_NAME if partial else None
        token = secrets.token_hex(16)
        try:
            if probe is not None:
                probe.write_text(token)
            for name, problem in self._on_every_node(unseen, probe, token, inputs):
                if problem:
                    remedy = "use a file system that every node mounts at the same path"
                    raise ClusterError(f"node {name}", problem, remedy)
        except OSError as exc:
            raise write_error(partial or Path(), PROBE_NAME, exc) from exc
        finally:
            if probe is not None:
                with suppress(OSError):
                    probe.unlink()

    def _on_every_node(
        self, function: Callable[..., R], *arguments: Any
    ) -> Iterator[tuple[str, R]]:
        """Call a function on every node; yields each node's name with the result."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self._ray.remote(num_cpus=0, max_retries=1)(function)
        calls = [
            (
                named(node["NodeManagerHostname"], node["NodeID"]),
                task.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote(*arguments),
            )
            for node in self._nodes
        ]
        for name, call in calls:
            try:
                yield name, self._ray.get(call)
            except self._ray.exceptions.RayError as exc:
                problem = f"cannot take part ({_cause(exc)})"
                remedy = "check that diffxfer is installed there for the Python that Ray uses"
                raise ClusterError(f"node {name}", problem, remedy) from exc

    def threads(self, wanted: int | None) -> int:
        """The number of threads of a part.

        Args:
            wanted: the number that was asked for; by default as many processors as the smallest
                node has, at most eight.

        Raises:
            ClusterError: if no node has so many processors.
        """
        found = [int(node["Resources"].get("CPU", 0)) for node in self._nodes]
        places = [count for count in found if count]
        if not places or (wanted or 1) > max(places):
            problem = f"no node has {wanted or 1} processors for Ray; they have {_listed(found)}"
            raise ClusterError("--threads", problem, "give fewer, or start larger nodes")
        return wanted or min(_MOST_THREADS, *places)

    def run(
        self,
        function: Callable[[T, Callable[[int], None]], R],
        work: Sequence[T],
        *,
        name: str,
        threads: int,
        gpus: float = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, R]]:
        """Call a function once for each piece of work, somewhere on the cluster.

        See `streaming.distribute.Cluster.run`.
        """
        self._check_gpus(gpus)
        tally = self._ray.remote(num_cpus=0)(Tally).remote()
        task = self._ray.remote(
            num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES, scheduling_strategy="SPREAD"
        )(do_piece)

        def start(index: int) -> Any:
            label = f"{name} {index + 1} of {len(work)}"
            return task.options(name=label).remote(function, work[index], index, tally)

        places = self._places(threads, gpus)
        pieces = _Pieces(self._ray, start, len(work), _QUEUED_PER_PLACE * places)
        try:
            while pieces.left():
                for index, ref in pieces.wait():
                    value = self._result(pieces, index, ref)
                    if value:
                        yield index, pickle.loads(value)
                if progress is not None:
                    progress(self._ray.get(tally.total.remote()))
        finally:
            pieces.stop(_CANCEL_S)
            self._ray.kill(tally)
        pieces.raise_first()

    def _result(self, pieces: _Pieces, index: int, ref: Any) -> bytes:
        """The pickled result of a piece that has ended; empty if it failed."""
        try:
            outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as exc:
            problem = f"part {index + 1} was lost on the cluster ({_cause(exc)})"
            remedy = "run ray status, and read the logs in Ray's session folder"
            pieces.fail(index, ClusterError("--ray", problem, remedy))
            return b""
        if outcome.error is not None:
            pieces.fail(index, outcome.error)
            return b""
        if xxhash.xxh3_128_hexdigest(outcome.data) != outcome.checksum:
            problem = f"the result of part {index + 1} was damaged on its way"
            pieces.fail(index, ClusterError(f"node {outcome.node}", problem, "run it again"))
            return b""
        data: bytes = outcome.data
        return data

    def _places(self, threads: int, gpus: float) -> int:
        """How many pieces can run at once, at least one."""
        places = 0
        for node in self._nodes:
            here = int(node["Resources"].get("CPU", 0) // threads)
            if gpus:
                here = min(here, int(node["Resources"].get("GPU", 0) / gpus))
            places += here
        return max(places, 1)

    def _check_gpus(self, gpus: float) -> None:
        found = [node["Resources"].get("GPU", 0) for node in self._nodes]
        if gpus and gpus > max(found, default=0):
            problem = f"no node has {gpus:g} GPUs for Ray; they have {_listed(found)}"
            raise ClusterError("--ray", problem, "start nodes with GPUs, or use --device cpu")


class _Pieces:
    """Pieces of work that are queued, running or done."""

    def __init__(self, ray: Any, start: Callable[[int], Any], count: int, most: int) -> None:
        self._ray: Any = ray  # most of its interface is not typed
        self._start = start
        self._queue = deque(range(count))
        self._most = most
        self._running: dict[Any, int] = {}
        self._failures: dict[int, BaseException] = {}

    def left(self) -> bool:
        """Whether any piece is queued or running."""
        return bool(self._queue or self._running)

    def wait(self) -> list[tuple[int, Any]]:
        """Start pieces, and wait a moment; returns those that have ended."""
        while self._queue and len(self._running) < self._most:
            index = self._queue.popleft()
            self._running[self._start(index)] = index
        ended, _ = self._ray.wait([*self._running], num_returns=1, timeout=_POLL_S)
        return [(self._running.pop(ref), ref) for ref in ended]

    def fail(self, index: int, exc: BaseException) -> None:
        """Record a failure, and stop the pieces after it."""
        self._failures[index] = exc
        first = min(self._failures)
        self._queue = deque(other for other in self._queue if other < first)
        for ref, other in [*self._running.items()]:
            if other > first:
                self._ray.cancel(ref)

    def stop(self, wait_s: float) -> None:
        """Stop what still runs, and wait for it, so that it does not write any longer."""
        self._queue.clear()
        for ref in self._running:
            self._ray.cancel(ref)
        if self._running:
            refs = [*self._running]
            self._ray.wait(refs, num_returns=len(refs), timeout=wait_s)
        self._running.clear()

    def raise_first(self) -> None:
        """Raise the earliest failure, if there is one."""
        if self._failures:
            raise self._failures[min(self._failures)]


def _cause(exc: BaseException) -> str:
    cause = getattr(exc, "cause", None) or exc
    return f"{type(cause).__name__}: {first_line(cause)}"


def _listed(counts: Sequence[float]) -> str:
    return ", ".join(f"{count:g}" for count in counts) or "none"
