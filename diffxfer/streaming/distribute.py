"""A plan's parts on a cluster: the run that owns the folder cuts it, and takes the results over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.part_journal import checksum_of, done_in_part, part_journals
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import ClusterError
from diffxfer.streaming.completed import ChunkSet
from diffxfer.streaming.part_run import WrittenPart, measure_part, write_part
from diffxfer.streaming.parts import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.shard_writer import ShardWriter
    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.streaming.completed import Completed
    from diffxfer.streaming.part_run import Report
    from diffxfer.streaming.parts import Part, Workload
    from diffxfer.streaming.plan import Plan
    from diffxfer.streaming.statistics import TensorResult

T = TypeVar("T")
R = TypeVar("R")


class Cluster(Protocol):
    """Processes on several machines that do work for a run."""

    def part_bytes(self, total_bytes: int, threads: int, gpus: float = 0) -> int:
        """The bytes that a part of a plan of so many bytes reads and writes, about."""

    def threads(self, wanted: int | None) -> int:
        """The number of threads of a part, which some node has; by default as many as each has."""

    def most_gpus(self) -> float:
        """The number of GPUs of the node that has most."""

    def check_folders(self, partial: Path | None, inputs: Sequence[ShardFile]) -> None:
        """Refuse nodes that do not see the files of a run.

        Raises:
            ClusterError: for the first one.
        """

    def run(
        self,
        function: Callable[[T, Report], R],
        work: Sequence[T],
        *,
        name: str,
        threads: int,
        gpus: float = 0,
        memory: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, R], None, None]:
        """Call a function once for each piece of work, somewhere on the cluster.

        A piece whose node is lost is done again elsewhere. If one fails, those before it are still
        finished and yielded, those after it are stopped.

        Args:
            function: a function of a module, called with the piece and with a function that
                reports how much of it is done.
            work: the pieces.
            name: says what is done, for the cluster's own pages.
            threads: processors of a piece.
            gpus: GPUs of a piece.
            memory: the bytes of memory to set aside for it; None for what a part of a plan needs.
            progress: called with the sum of what is reported.

        Yields:
            The index and the result of each piece, as they end.

        Raises:
            DiffxferError: the earliest failure in the order of the pieces.
        """


def write_parts(
    plan: Plan,
    folder: OutputFolder,
    completed: Completed,
    writers: Collection[ShardWriter],
    cluster: Cluster,
    load: Workload,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write every shard of a plan on a cluster, or what is left of them.

    Args:
        plan: the plan.
        folder: the output folder, inside its `with` block.
        completed: the completed chunks; the parts' results are recorded there.
        writers: every output shard.
        cluster: where the parts run.
        load: how they run.
        progress: called with the bytes done and the total bytes.

    Raises:
        DiffxferError: the earliest failure in the order of the plan.
    """
    cluster.check_folders(folder.partial, plan.inputs)
    _create(folder, writers)
    before, total = completed.resumed_bytes, plan.bytes_to_read + plan.bytes_to_write
    gpus = 0 if load.device == "cpu" else 1
    part_bytes = cluster.part_bytes(total - before, load.threads, gpus)
    parts = [*cut(plan, completed.chunks, load, part_bytes)]

    def show(done: int) -> None:
        if progress is not None:
            progress(min(before + done, total), total)

    running = cluster.run(
        *(write_part, parts), name="diffxfer", threads=load.threads, gpus=gpus, progress=show
    )
    # After a failure, the journals of unfinished parts stay in the folder, for the next run; but no
    # part may still write when the folder is removed.
    with closing(running):
        for index, written in running:
            _absorb(parts[index], written, folder, completed)
    _remove_part_journals(folder)
    if progress is not None:
        progress(total, total)


def _create(folder: OutputFolder, writers: Collection[ShardWriter]) -> None:
    """Allocate the shards, and make durable what an earlier run has written."""
    try:
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="allocate") as pool:
            for future in [pool.submit(writer.create) for writer in writers]:
                future.result()
        for writer in writers:
            writer.sync()
        folder.journal.mark(folder.journal.size)
    except OSError as exc:
        raise write_error(folder.out, "", exc) from exc


def _absorb(part: Part, written: WrittenPart, folder: OutputFolder, completed: Completed) -> None:
    """Take over the results of a part that is done, and remove its journals."""
    path = folder.partial / written.journal
    first_chunk, fingerprint = part.plan.first_chunk, part.load.fingerprint
    try:
        if checksum_of(path) != written.checksum:
            problem = f"{path.name} is not what the node wrote"
            raise ClusterError(folder.out, problem, "check the file system that the nodes share")
        paths = part_journals(folder.partial, (part.load.run, first_chunk))
        for each in {path, *paths}:
            completed.absorb(done_in_part(each, fingerprint))
        # Its data is durable, since the node has synced it.
        folder.journal.mark(folder.journal.size)
        for each in {path, *paths}:
            each.unlink(missing_ok=True)
    except OSError as exc:
        raise write_error(folder.out, JOURNAL_NAME, exc) from exc


def _remove_part_journals(folder: OutputFolder) -> None:
    """Remove what attempts have left that Ray had given up, so that it is not published."""
    try:
        for path in part_journals(folder.partial):
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise write_error(folder.out, JOURNAL_NAME, exc) from exc


def measure_parts(
    plan: Plan, cluster: Cluster, load: Workload, progress: Callable[[int, int], None] | None
) -> Sequence[TensorResult]:
    """Run a plan without outputs on a cluster.

    Args:
        plan: a plan whose tasks write nothing.
        cluster: where the parts run.
        load: how they run.
        progress: called with the bytes done and the total bytes.

    Returns:
        One result per task of the plan.

    Raises:
        DiffxferError: the earliest failure in the order of the plan.
    """
    cluster.check_folders(None, plan.inputs)
    total = plan.bytes_to_read
    part_bytes = cluster.part_bytes(total, load.threads)
    parts = [*cut(plan, ChunkSet(plan, load.chunk_elements), load, part_bytes)]
    found: dict[int, Any] = dict(
        cluster.run(
            *(measure_part, parts),
            name="diffxfer",
            threads=load.threads,
            progress=(lambda done: progress(min(done, total), total)) if progress else None,
        )
    )
    results = [result for index in range(len(parts)) for result in found[index]]
    assert len(results) == len(plan.tasks)
    return results
