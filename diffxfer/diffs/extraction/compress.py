"""The first of the two runs that make a packed diff vector: compute Δ, and compress its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.extraction.packer import Packer
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.plan import BLOCK_ELEMENTS, chunks_of
from diffxfer.streaming.process_output import process_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.encodings.rounding import Rounding
    from diffxfer.checkpoints.writer import OutputFolder
    from diffxfer.diffs.extraction.spool import PackedBytes, Spool
    from diffxfer.diffs.jobs.job import RunOptions
    from diffxfer.streaming.plan import Plan, TensorTask
    from diffxfer.streaming.statistics import TensorResult


@dataclass(frozen=True, slots=True)
class Compressed:
    """What the first run has made.

    Attributes:
        packed: every tensor, its blocks in the spool.
        results: one result per task of the plan.
        chunks: the number of the plan's chunks.
        resumed_bytes: bytes that an earlier run has read, and this one has not.
    """

    packed: list[PackedBytes]
    results: Sequence[TensorResult]
    chunks: int
    resumed_bytes: int


def compress(
    plan: Plan,
    brought: Sequence[TensorTask],
    folder: OutputFolder,
    spool: Spool,
    how: tuple[int, Rounding | None],
    options: RunOptions,
    further_bytes: int,
) -> Compressed:
    """Compress every difference, or those that earlier runs have not.

    Args:
        plan: the plan that computes every difference in float64.
        brought: the tasks of tensors that the second run writes besides.
        folder: the output folder, inside its `with` block.
        spool: its spool.
        how: the level of compression, and the lossy form or None.
        options: how to run it.
        further_bytes: about as many bytes the second run moves.

    Returns:
        What was made.

    Raises:
        DiffxferError: for every known failure; the same command continues then.
    """
    packer, completed = _take_up(plan, brought, folder, spool, how)
    results = process_output(
        plan,
        folder,
        completed,
        sinks=packer.sinks,
        files=(spool,),
        observe=packer.observe,
        further_bytes=further_bytes,
        threads=options.threads,
        progress=options.progress,
        allow_nonfinite=options.allow_nonfinite,
    )
    chunks = completed.chunks.first[-1]
    return Compressed(packer.packed(), results, chunks, completed.resumed_bytes)


def _take_up(
    plan: Plan,
    brought: Sequence[TensorTask],
    folder: OutputFolder,
    spool: Spool,
    how: tuple[int, Rounding | None],
) -> tuple[Packer, Completed]:
    """What earlier runs have packed, if it is still in the spool."""
    packer = Packer(plan, spool, *how)
    completed = Completed(plan, BLOCK_ELEMENTS, folder, packer)
    if spool.take_up(packer.end) or _is_copied(packer, completed, brought, folder):
        return packer, completed
    completed.forget()
    spool.take_up(0)
    packer = Packer(plan, spool, *how)
    return packer, Completed(plan, BLOCK_ELEMENTS, folder, packer)


def _is_copied(
    packer: Packer, completed: Completed, brought: Sequence[TensorTask], folder: OutputFolder
) -> bool:
    """Whether the second run was complete: the spool is removed just before the publication."""
    if not completed.is_whole:
        return False
    sizes = (stored.nbytes for stored in packer.packed())
    chunks = sum(-(-size // BLOCK_ELEMENTS) for size in sizes)
    chunks += sum(chunks_of(task, BLOCK_ELEMENTS) for task in brought)
    first = completed.chunks.first[-1]
    return sum(done.number >= first for done in folder.journal.done()) == chunks
