"""Running one part of a plan, in a process of its own that may be on another machine."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.journal import JOURNAL_NAME, Done, Journal
from diffxfer.checkpoints.part_journal import (
    checksum_of,
    done_in_part,
    new_part_journal,
    part_journals,
)
from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.checkpoints.writer import write_error
from diffxfer.streaming.accelerator import open_accelerator
from diffxfer.streaming.completed import ChunkSet, Completed, pack
from diffxfer.streaming.device import check_device
from diffxfer.streaming.plan import chunks_of
from diffxfer.streaming.sync import SYNC_INTERVAL_S, Syncer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from diffxfer.streaming.completed import Record
    from diffxfer.streaming.parts import Part
    from diffxfer.streaming.plan import Chunk, Plan
    from diffxfer.streaming.statistics import ChunkResult, TensorResult

    Report = Callable[[int], None]
    """Called with the bytes of a part that are read and written so far."""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """What a part that writes has left in the partial folder.

    Attributes:
        journal: the name of its journal.
        checksum: the xxh3-128 of that journal, in hexadecimal.
    """

    journal: str
    checksum: str


@dataclass(frozen=True, slots=True)
class _Folder:
    """The partial folder of another process's run."""

    out: Path
    partial: Path
    journal: Journal


class _PartRecord:
    """The done chunks of a part, recorded in its own journal. The results are only passed on."""

    def __init__(self, part: Part, folder: _Folder) -> None:
        self._folder = folder
        self._done = ChunkSet(part.plan, part.load.chunk_elements)
        for number in part.done:
            self._done.add(number)
        self.resumed_bytes = 0
        for path in part_journals(folder.partial, (part.load.run, part.plan.first_chunk)):
            if path != folder.journal.path:  # an earlier attempt, whose node was lost
                for done in done_in_part(path, part.load.fingerprint):
                    if self._done.covers(done.number) and done.number not in self._done:
                        self._done.add(done.number)
                        self.resumed_bytes += done.moved

    def __contains__(self, number: object) -> bool:
        return number in self._done

    def add(self, done: Sequence[tuple[Chunk, int, ChunkResult]]) -> None:
        taken = [Done(chunk.number, moved, pack(result)) for chunk, moved, result in done]
        try:
            self._folder.journal.add(taken)
        except OSError as exc:
            raise write_error(self._folder.out, JOURNAL_NAME, exc) from exc

    def results(self) -> Sequence[TensorResult]:
        return ()

    def pending(self, plan: Plan, chunk_elements: int) -> Counter[str]:
        """The number of chunks of each shard that are not done."""
        pending = Counter[str]()
        number = plan.first_chunk
        for task in plan.tasks:
            stop = number + chunks_of(task, chunk_elements)
            if task.shard is not None:
                pending[task.shard] += sum(n not in self._done for n in range(number, stop))
            number = stop
        return pending


def write_part(part: Part, report: Report) -> WrittenPart:
    """Do a part of a run that writes: its shards exist already, allocated.

    Args:
        part: the part.
        report: called with the bytes done.

    Returns:
        Where its results are.

    Raises:
        DiffxferError: the earliest failure of the part.
    """
    load = part.load
    assert load.partial is not None
    check_device(load.device)
    try:
        journal = new_part_journal(load.partial, load.fingerprint, load.run, part.plan.first_chunk)
        journal.begin(part.nbytes)
    except OSError as exc:
        raise write_error(load.out, JOURNAL_NAME, exc) from exc
    folder = _Folder(load.out, load.partial, journal)
    try:
        record = _PartRecord(part, folder)
        pending = record.pending(part.plan, load.chunk_elements)
        writers = {
            name: ShardWriter(folder, name, layout, pending[name], begun=True)
            for name, layout in part.plan.layouts.items()
        }
        _run(part, writers, record, folder, report)
    finally:
        journal.close()
    return WrittenPart(journal.path.name, checksum_of(journal.path))


def _run(
    part: Part,
    writers: dict[str, ShardWriter],
    record: _PartRecord,
    folder: _Folder,
    report: Report,
) -> None:
    syncer = Syncer(folder, writers.values(), SYNC_INTERVAL_S)
    try:
        _compute(part, writers, record, syncer, report)
        for name, writer in writers.items():
            try:
                writer.sync()
            except OSError as exc:
                raise write_error(folder.out, name, exc) from exc
        try:
            folder.journal.mark(folder.journal.size)
        except OSError as exc:
            raise write_error(folder.out, JOURNAL_NAME, exc) from exc
    except BaseException as exc:
        syncer.abandon(exc)
        raise


def _compute(
    part: Part,
    writers: dict[str, ShardWriter],
    record: Record,
    syncer: Syncer | None,
    report: Report,
) -> Sequence[TensorResult]:
    from diffxfer.streaming.engine import Engine

    created: Future[None] = Future()
    created.set_result(None)
    load = part.load
    with open_accelerator(load.device, part.plan, load.threads, load.device_memory) as accelerator:
        engine = Engine(
            *(part.plan, writers, dict.fromkeys(writers, created), record),
            chunk_elements=load.chunk_elements,
            allow_nonfinite=load.allow_nonfinite,
            accelerator=accelerator,
        )
        return engine.run(load.threads, syncer, lambda done, _: report(done))


def measure_part(part: Part, report: Report) -> Sequence[TensorResult]:
    """Do a part of a plan that writes nothing.

    Args:
        part: the part.
        report: called with the bytes done.

    Returns:
        One result per task of the part.

    Raises:
        DiffxferError: the earliest failure of the part.
    """
    record = Completed(part.plan, part.load.chunk_elements, None)
    return _compute(part, {}, record, None, report)
