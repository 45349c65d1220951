"""How far base + Δ of an adapter is from the fine-tune that it approximates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.encodings.adapted import in_float64
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.diffs.artifact.distances import Distance
from diffxfer.diffs.delta.difference_rows import difference_runs, stored_delta
from diffxfer.diffs.delta.from_adapter import adapted_checkpoint
from diffxfer.diffs.delta.from_checkpoints import from_checkpoints
from diffxfer.diffs.matching.names import is_head
from diffxfer.diffs.matching.refusal import group_problems, refusal
from diffxfer.diffs.matching.selection import make_selection
from diffxfer.streaming.plan import BLOCK_ELEMENTS, RunKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.encodings.adapted import Values
    from diffxfer.checkpoints.stored import Files, StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.diffs.matching.role import Role
    from diffxfer.streaming.plan import Run


def measure_distances(
    adapter: Adapter,
    finetuned: Role,
    base: Role,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Distance, ...]:
    """Compare base + Δ of an adapter with a fine-tune, tensor by tensor, in float64.

    Args:
        adapter: the adapter.
        finetuned: the fine-tuned checkpoint.
        base: its base.
        progress: called with the bytes done and the total bytes.

    Returns:
        The distance in each tensor of Δ; rows of tokens that base lacks are left out.

    Raises:
        DiffxferError: if the models do not fit each other, or one cannot be read.
    """
    merged = adapted_checkpoint(adapter, base.checkpoint).tensors
    source = from_checkpoints(finetuned, base, make_selection(), str, "auto", "drop")
    if source.match.problems:
        raise refusal(group_problems(source.match.problems))
    found = []
    total = sum(difference.sources[0].nbytes for difference in source.match.differences)
    done, files = 0, one_at_a_time()
    for difference in source.match.differences:
        name = _name(difference)
        ours = merged.get(name, difference.sources[1])
        found.append(_measure(name, difference, ours, source, files))
        done += difference.sources[0].nbytes
        if progress is not None:
            progress(done, max(total, 1))
    return tuple(found)


def _name(difference: Difference) -> str:
    """Base's name of a tensor; the head's for a head that base ties."""
    theirs = difference.sources[1].name
    return difference.name if is_head(difference.name) and not is_head(theirs) else theirs


def _measure(
    name: str, difference: Difference, merged: StoredTensor, source: Source, files: Files
) -> Distance:
    finetuned, base = difference.sources
    runs = difference_runs(source, difference)
    # Δ of an adapter is exact; the sum with base is rounded to base's dtype.
    delta, exact = merged.minus(base), stored_delta(difference, runs)
    squares = np.zeros(2)
    for first, other, count in _blocks(difference, runs):
        theirs = in_float64(files, base, other, count)
        if exact is None:
            whole = in_float64(files, finetuned, first, count) - theirs
        else:
            whole = _read(files, exact, first, count)
        ours = np.zeros(count)
        if delta is not None:
            ours = _read(files, delta, other, count)
        elif merged is not base:
            at = first if merged.shape == finetuned.shape else other
            ours = in_float64(files, merged, at, count) - theirs
        squares += np.square(ours - whole).sum(), np.square(whole).sum()
    error, size = np.sqrt(squares).tolist()
    return Distance(name, error, size)


def _read(files: Files, delta: StoredTensor, start: int, count: int) -> Values:
    """Elements of a Δ that is stored itself."""
    found = np.zeros(count)
    delta.read(files, start, memoryview(found.data).cast("B"))
    return found


def _blocks(difference: Difference, runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """The first elements in finetuned and base of each block of paired rows, and its size."""
    ours = difference.sources[0]
    width = ours.elements // (runs[-1].start + runs[-1].count) if ours.elements else 0
    for run in runs:
        if run.kind is RunKind.GRAFT:
            for done in range(0, run.count * width, BLOCK_ELEMENTS):
                count = min(BLOCK_ELEMENTS, run.count * width - done)
                first, other = (row * width + done for row in run.rows[:2])
                yield first, other, count
