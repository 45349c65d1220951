"""Which rows a difference is made of, and whether it is stored instead of computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.diffs.vocab.rows import extract_runs
from diffxfer.streaming.plan import Run, RunKind, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.match import Difference


def stored_delta(difference: Difference, runs: Sequence[Run]) -> StoredTensor | None:
    """Δ of an adapter's tensor, which need not be computed by subtraction; None for others.

    Args:
        difference: one tensor of Δ.
        runs: how its rows are made; the first inputs are (finetuned, base). If finetuned's rows are
            not base's rows of the same number, Δ cannot be read by row.
    """
    if len(difference.sources) != 2:
        return None
    if any(
        run.kind is RunKind.ADD or (run.kind is RunKind.GRAFT and run.rows[0] != run.rows[1])
        for run in runs
    ):
        return None
    return difference.sources[0].minus(difference.sources[1])


def difference_runs(source: Source, difference: Difference) -> tuple[Run, ...]:
    """The runs of rows of a difference; the inputs are (finetuned, base).

    Args:
        source: finetuned and base.
        difference: one tensor of their difference.

    Raises:
        VocabularyError: if its rows cannot be paired.
    """
    ours, theirs = difference.sources
    runs: list[Run] = []
    if difference.vocabulary:
        rows = ours.shape[0], theirs.shape[0]
        pairing = source.vocabulary.base_pairing
        runs = extract_runs(pairing, finetuned_rows=rows[0], base_rows=rows[1])
    return tuple(runs) or whole(RunKind.GRAFT, 2)
