"""A Ray cluster that does the work of a run."""

from __future__ import annotations

import logging
import os
import pickle
import re
import secrets
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from diffxfer.checkpoints.writer import write_error
from diffxfer.cluster.needs import Needs, counts_of, many
from diffxfer.cluster.node_work import SAME, do_piece, named, other_version, unseen, versions
from diffxfer.cluster.pieces import Patience, Pieces, Progress
from diffxfer.errors import ClusterError, first_line, listed
from diffxfer.streaming.parts import LEAST_PART_BYTES, PART_BYTES, PARTS_PER_PLACE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from types import TracebackType

    from diffxfer.checkpoints.stored import ShardFile

T = TypeVar("T")
R = TypeVar("R")

PROBE_NAME = "diffxfer.probe"
_ADDRESS = re.compile(r"(?:ray://)?(?:\[([^]]+)\]|([^:/\[]+)):([0-9]+)(?:/.*)?")
_REACH_S, _ANSWER_S, _PATIENCE_S = 5.0, 120.0, 120.0
"""How long a cluster has to be reached, its nodes to answer, and a lost node to come back."""
_QUEUED_PER_PLACE = 3
"""Pieces handed to Ray for each that can run at once: a trillion parameters have hundreds."""
_RETRIES = 5
_MOST_THREADS = 8


class RayCluster:
    """A connection to a Ray cluster; use it as a context manager.

    If the process is connected to a cluster already, that connection is used, and left open.

    Args:
        address: of the cluster's head, as `ray.init` takes it; by default what the environment
            variable RAY_ADDRESS says, else a cluster of this machine alone is started and stopped.
        part_bytes: the bytes that a part of a plan reads and writes, about; by default 10 GB, or
            less where nodes would have nothing to do.

    Raises:
        ClusterError: if Ray is not installed, the cluster cannot be reached or has no processors,
            or one of its nodes has another version of diffxfer, torch, numba or Python.

    Example:
        >>> with RayCluster("10.0.0.1:6379") as cluster:  # doctest: +SKIP
        ...     transfer("sft", "base", "target", "graft", cluster=cluster)
    """

    def __init__(self, address: str | None = None, *, part_bytes: int | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._part_bytes = part_bytes
        self._ours = False
        self._module: Any = None  # most of its interface is not typed

    @property
    def _ray(self) -> Any:
        if self._module is None:
            remedy = "use it in a block: with RayCluster() as cluster"
            raise ClusterError("RayCluster", "is not connected", remedy)
        return self._module

    def __enter__(self) -> RayCluster:
        try:
            import ray
        except ImportError as exc:
            remedy = "install it: pip install 'diffxfer[ray]'"
            raise ClusterError("--ray", "needs Ray, which is not installed", remedy) from exc
        self._module = ray
        try:
            if not ray.is_initialized():
                self._connect()
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
        local: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
        try:
            self._reach()
            self._ours = True  # what a failed attempt has started must be stopped as well
            with _signals_kept():
                self._ray.init(
                    address=self.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **local,
                )
        except Exception as exc:  # Ray raises many kinds, down to RuntimeError and ValueError
            problem = f"no cluster can be used there ({first_line(exc)})"
            remedy = "check that it runs: ray status --address HOST:PORT"
            raise ClusterError(f"--ray {self.address}", problem, remedy) from exc

    def _reach(self) -> None:
        """Raise `OSError` if nobody listens: Ray itself would try for minutes."""
        if found := _ADDRESS.fullmatch(self.address):
            place = found[1] or found[2], min(int(found[3]), 65535)
            socket.create_connection(place, timeout=_REACH_S).close()

    @property
    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that can take a piece: a head often has no processors for Ray."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]

    def description(self) -> str:
        """The nodes, in words: what a command says before it begins."""
        nodes = self._nodes
        count = sum(int(node["Resources"]["CPU"]) for node in nodes)
        gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
        hosts = sorted({node["NodeManagerHostname"] for node in nodes})
        more = f", {many(gpus, 'GPU')}" if gpus else ""
        places = f"{many(len(nodes), 'node')} ({listed(hosts)})"
        return f"on Ray: {places}, {many(count, 'processor')}{more}"

    def _check_versions(self) -> None:
        if not self._nodes:
            remedy = "start nodes with processors: ray start --num-cpus N"
            raise ClusterError("--ray", "no node has a processor for Ray", remedy)
        ours = versions()
        for name, theirs in self._on_every_node(versions):
            if problem := other_version(ours, theirs):
                raise ClusterError(f"node {name}", problem, SAME)

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
        calls = []
        for node in self._nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            call = task.options(scheduling_strategy=there).remote(*arguments)
            calls.append((named(node["NodeManagerHostname"], node["NodeID"]), call))
        for name, call in calls:
            try:
                yield name, self._ray.get(call, timeout=_ANSWER_S)
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
        found = [int(node["Resources"]["CPU"]) for node in self._nodes]
        if not found or (wanted or 1) > max(found):
            count = many(wanted or 1, "processor")
            problem = f"no node has {count} for Ray; they have {counts_of(found)}"
            raise ClusterError("--threads", problem, "give fewer, or start larger nodes")
        return wanted or min(_MOST_THREADS, *found)

    def most_gpus(self) -> float:
        """The number of GPUs of the node that has most."""
        found = (node["Resources"].get("GPU", 0) for node in self._nodes)
        return float(max(found, default=0))

    def part_bytes(self, total_bytes: int, threads: int, gpus: float = 0) -> int:
        """The bytes that a part of a plan of so many bytes reads and writes, about.

        See `streaming.distribute.Cluster.part_bytes`.
        """
        if self._part_bytes is not None:
            return self._part_bytes
        places = max(Needs.of_piece(threads, gpus).places(self._nodes), 1)
        fair = total_bytes // (PARTS_PER_PLACE * places)
        return min(PART_BYTES, max(LEAST_PART_BYTES, fair))

    def run(
        self,
        function: Callable[[T, Callable[[int], None]], R],
        work: Sequence[T],
        *,
        name: str,
        threads: int,
        gpus: float = 0,
        memory: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, R], None, None]:
        """Call a function once for each piece of work, somewhere on the cluster.

        See `streaming.distribute.Cluster.run`.
        """
        self._check_gpus(gpus)
        needs = Needs.of_piece(threads, gpus, memory)
        shown, ours = self._progress(), versions()
        task = self._ray.remote(
            num_cpus=threads,
            num_gpus=gpus,
            memory=needs.memory,
            max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )(do_piece)

        def start(index: int) -> Any:
            label = f"{name} {index + 1} of {len(work)}"
            return task.options(name=label).remote(ours, function, work[index], index, shown.actor)

        most = _QUEUED_PER_PLACE * max(needs.places(self._nodes), 1)
        pieces = Pieces(self._ray, start, shown.stop_after, len(work), most)
        patience = Patience(_PATIENCE_S)
        try:
            while pieces.left():
                ended = pieces.wait()
                for index, ref in ended:
                    value = self._result(pieces, index, ref)
                    if value:
                        yield index, pickle.loads(value)
                if progress is not None:
                    progress(shown.total())
                if not ended and patience.is_over(needs.places(self._nodes)):
                    raise needs.nowhere()
        finally:
            pieces.stop()
            shown.close()
        pieces.raise_first()

    def _progress(self) -> Progress:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On a node that has diffxfer, and better on this one, which lives as long as the run.
        here = self._ray.get_runtime_context().get_node_id()
        ids = [node["NodeID"] for node in self._nodes]
        place = here if here in ids or not ids else ids[0]
        return Progress(self._ray, NodeAffinitySchedulingStrategy(place, soft=True))

    def _result(self, pieces: Pieces, index: int, ref: Any) -> bytes:
        """The pickled result of a piece that has ended; empty if it failed or was stopped."""
        try:
            outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as exc:
            problem = f"part {index + 1} was lost on the cluster ({_cause(exc)})"
            remedy = "run ray status, and read the logs in /tmp/ray/session_latest/logs there"
            pieces.fail(index, ClusterError("--ray", problem, remedy))
            return b""
        if outcome.error is not None:
            pieces.fail(index, outcome.error)
            return b""
        if not outcome.checksum:
            return b""  # it was stopped
        if xxhash.xxh3_128_hexdigest(outcome.data) != outcome.checksum:
            problem = f"the result of part {index + 1} was damaged on its way"
            pieces.fail(index, ClusterError(f"node {outcome.node}", problem, "run it again"))
            return b""
        data: bytes = outcome.data
        return data

    def _check_gpus(self, gpus: float) -> None:
        found = [node["Resources"].get("GPU", 0) for node in self._nodes]
        if gpus > self.most_gpus():
            problem = f"no node has {gpus:g} GPUs for Ray; they have {counts_of(found)}"
            raise ClusterError("--ray", problem, "start nodes with GPUs, or use --device cpu")


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _cause(exc: BaseException) -> str:
    cause = getattr(exc, "cause", None) or exc
    return f"{type(cause).__name__}: {first_line(cause)}"
