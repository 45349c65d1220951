"""Turning token pairings into runs of rows, for one tensor.

A tensor may have more rows than its tokenizer has tokens (padding), or fewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffxfer.diffs.vocab.pair_base import ADDED, NONE
from diffxfer.errors import VocabularyError
from diffxfer.streaming.plan import Run, RunKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.vocab.pair_base import BasePairing, Ids
    from diffxfer.diffs.vocab.pair_target import TargetPairing

_KINDS = (RunKind.GRAFT, RunKind.COPY, RunKind.ADD, RunKind.ZERO)
_GRAFT, _COPY, _ADD, _ZERO = range(4)


def extract_runs(
    base_pairing: BasePairing | None, *, finetuned_rows: int, base_rows: int
) -> list[Run]:
    """The runs of a vocabulary tensor of the diff vector; the inputs are (finetuned, base).

    Args:
        base_pairing: how the tokens pair; None, if no role has a tokenizer, to pair by position.
        finetuned_rows: the tensor's row count in finetuned and in the diff vector.
        base_rows: its row count in base.

    Returns:
        Runs that cover the rows: ``GRAFT`` (a difference), ``ADD`` (finetuned's row of a token that
        it added) and ``ZERO`` (no token, or no row for it in base).

    Raises:
        VocabularyError: finetuned lacks the row of a token that it shares with base, or there is no
            tokenizer and the row counts differ.
    """
    rows = np.arange(finetuned_rows, dtype=np.int64)
    if base_pairing is None:
        _same_rows({"finetuned": finetuned_rows, "base": base_rows})
        return _runs(np.full(finetuned_rows, _GRAFT), rows, rows)
    _check_lost(base_pairing, finetuned_rows, base_rows)
    ids = _fit(base_pairing.base_ids, finetuned_rows)
    padding = max(len(base_pairing.base_ids), base_pairing.base_tokens)
    ids[padding:] = rows[padding:]
    kind = np.full(finetuned_rows, _ZERO)
    kind[(ids >= 0) & (ids < base_rows)] = _GRAFT
    kind[ids == ADDED] = _ADD
    return _runs(kind, np.where(kind == _ZERO, -1, rows), np.where(kind == _GRAFT, ids, -1))


def graft_runs(
    pairing: TargetPairing | None,
    base_pairing: BasePairing | None,
    *,
    finetuned_rows: int,
    base_rows: int | None,
    target_rows: int,
) -> tuple[int, list[Run]]:
    """The runs of a vocabulary tensor of the output.

    The inputs are (finetuned, base, target), or (diff vector, target) if ``base_rows`` is None.

    Args:
        pairing: how the tokens pair; None, if no role has a tokenizer, to pair by position.
        base_pairing: how finetuned's tokens pair with base's; None for a diff vector, or if base
            has no tokenizer, to pair by position.
        finetuned_rows: the tensor's row count in finetuned, or in the diff vector.
        base_rows: its row count in base, None for a diff vector.
        target_rows: its row count in the target.

    Returns:
        The output's row count, and runs that cover the rows: ``GRAFT``, ``COPY`` (the target's row
        is kept) and ``ADD`` (finetuned's row of a token that it added). Rows are appended only if
        the target's padding rows cannot hold the added tokens.

    Raises:
        VocabularyError: finetuned lacks the row of a token that it shares with base, the target
            lacks rows below an added token's, or there is no tokenizer and the row counts differ.
    """
    if pairing is None:
        counts = {"finetuned": finetuned_rows, "base": base_rows, "target": target_rows}
        present = {role: count for role, count in counts.items() if count is not None}
        _same_rows(present)
        rows = np.arange(target_rows, dtype=np.int64)
        return target_rows, _runs(np.full(target_rows, _GRAFT), *[rows] * len(present))
    if base_rows is not None:
        if base_pairing is None:
            _same_rows({"finetuned": finetuned_rows, "base": base_rows})
        else:
            _check_lost(base_pairing, finetuned_rows, base_rows)
    added, output_rows = _additions(pairing, finetuned_rows, target_rows)
    rows = np.arange(output_rows, dtype=np.int64)
    ids = _fit(pairing.finetuned_ids, output_rows)
    graft = (ids >= 0) & (ids < finetuned_rows) & (rows < target_rows)
    base_ids = ids
    if base_rows is not None:
        if base_pairing is not None:
            paired = _fit(base_pairing.base_ids, max(finetuned_rows, 1))
            base_ids = np.where(graft, paired[np.where(graft, ids, 0)], NONE)
        graft &= (base_ids >= 0) & (base_ids < base_rows)
    kind = np.where(graft, _GRAFT, _COPY)
    kind[list(added)] = _ADD
    sources = np.where(graft, ids, -1)
    sources[list(added)] = list(added.values())
    inputs = [sources, np.where(kind == _ADD, -1, rows)]
    if base_rows is not None:
        inputs.insert(1, np.where(graft, base_ids, -1))
    return output_rows, _runs(kind, *inputs)


def _additions(
    pairing: TargetPairing, finetuned_rows: int, target_rows: int
) -> tuple[dict[int, int], int]:
    """The rows that finetuned brings, by output id, and the output's row count."""
    added = {place: i for place, i in pairing.kept.items() if place >= target_rows}
    added = {place: i for place, i in {**added, **pairing.additions}.items() if i < finetuned_rows}
    output_rows = max(target_rows, max(added, default=-1) + 1)
    if output_rows - target_rows > sum(place >= target_rows for place in added):
        first = min(place for place in added if place >= target_rows)
        name = repr(pairing.names[first]) if first in pairing.names else f"of id {first}"
        raise VocabularyError(
            "the target",
            f"has {target_rows} rows, but its tokenizer has {first} tokens, so there is no row "
            f"just before that of the added token {name}",
            "resize the target's embeddings to its tokenizer first",
        )
    return added, output_rows


def _check_lost(base_pairing: BasePairing, finetuned_rows: int, base_rows: int) -> None:
    beyond = base_pairing.base_ids[finetuned_rows:]
    lost = np.flatnonzero((beyond >= 0) & (beyond < base_rows)) + finetuned_rows
    if lost.size:
        raise VocabularyError(
            "finetuned",
            f"has {finetuned_rows} rows and base {base_rows}, so {lost.size} tokens that both "
            f"tokenizers have lack a row in finetuned (the first is id {lost[0]})",
            "give finetuned the tokenizer that it was resized for",
        )


def _same_rows(counts: Mapping[str, int]) -> None:
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {role}" for role, count in counts.items())
        raise VocabularyError(
            "the vocabulary's rows",
            f"{found}, and no tokenizer shows which belong together",
            "add the tokenizer files beside the weights",
        )


def _fit(ids: Ids, size: int) -> Ids:
    """A copy of that size, cut or filled with `NONE`."""
    fitted = np.full(size, NONE, dtype=np.int64)
    count = min(size, len(ids))
    fitted[:count] = ids[:count]
    return fitted


def _runs(kind: Ids, *inputs: Ids) -> list[Run]:
    """Join rows that are consecutive in every input into one run."""
    if not len(kind):
        return []
    same = kind[1:] == kind[:-1]
    for rows in inputs:
        before, after = rows[:-1], rows[1:]
        same &= np.where(before < 0, after == before, after == before + 1)
    starts = np.flatnonzero(np.append(True, ~same))
    counts = np.diff(starts, append=len(kind))
    columns = zip(*(rows[starts].tolist() for rows in inputs), strict=True)
    cut = zip(kind[starts].tolist(), starts.tolist(), counts.tolist(), columns, strict=True)
    return [Run(_KINDS[k], start, count, rows) for k, start, count, rows in cut]
