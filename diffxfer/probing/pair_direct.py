"""Adding a fourth model: the target's own fine-tune, paired with the target as with its base."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.diffs.delta.from_checkpoints import from_checkpoints, read_roles
from diffxfer.diffs.grafting.graft import label_roles
from diffxfer.diffs.matching.names import is_head
from diffxfer.diffs.matching.refusal import group_problems, refusal
from diffxfer.diffs.relations.relatedness import relate
from diffxfer.diffs.relations.sampling import sample_models
from diffxfer.diffs.vocab.rows import extract_runs
from diffxfer.errors import DiffxferError, MatchError, listed
from diffxfer.probing.pairing import say, unrounded, with_every_tensor
from diffxfer.streaming.plan import Run, RunKind, TensorTask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from diffxfer.checkpoints.stored import ShardFile, StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.diffs.matching.rename import Rename
    from diffxfer.probing.pair_options import PairOptions
    from diffxfer.probing.pairing import Pairing

    Rows = NDArray[np.int64]

_STANDS_FOR = {"direct": "finetuned", "target": "base"}
"""The roles that direct and target have when direct is paired."""
_WORD = re.compile(r"(?<![\w./'-])(finetuned|base)(?![\w./-])")
_NONE = -1


@dataclass(frozen=True, slots=True)
class WithDirect:
    """The tasks with a fourth input where direct has the rows.

    Attributes:
        tasks: one or two per tensor: if direct lacks some rows, these are in a task without it.
        shards: direct's files.
        warnings: one line each.
    """

    tasks: tuple[TensorTask, ...]
    shards: tuple[ShardFile, ...]
    warnings: tuple[str, ...]


def add_direct(
    direct: Path | str, target: Path | str, pairing: Pairing, options: PairOptions
) -> WithDirect:
    """Add direct to the tasks of a pairing.

    Args:
        direct: the target's own fine-tune: a folder or a Hub id, of a model or of an adapter.
        target: the target, as the user gave it.
        pairing: finetuned, base and target.
        options: the options that these were paired with.

    Raises:
        DiffxferError: if direct is not a sound checkpoint, or does not pair with the target.
    """
    with _naming_direct():
        source, warnings = _pair(direct, target, options)
        known = _by_target_name(source)
        tasks: list[TensorTask] = []
        for task in pairing.tasks:
            difference = known.get(task.name)
            tasks += [task] if difference is None else _with_direct(task, difference, source)
    lacking = [task.name for task in pairing.tasks if task.name not in known]
    if lacking:
        warnings.append(f"direct is not compared in {len(lacking):,} tensors: {listed(lacking)}")
    return WithDirect(tuple(tasks), source.shards, tuple(warnings))


def _pair(direct: Path | str, target: Path | str, options: PairOptions) -> tuple[Source, list[str]]:
    named = {"finetuned": direct, "base": target}
    roles = read_roles(named, _renames(options.renames))
    roles["finetuned"] = with_every_tensor(roles["finetuned"])
    labels = label_roles({**roles, "target": roles["base"]})
    source = from_checkpoints(
        roles["finetuned"],
        roles["base"],
        options.selection,
        lambda name: labels.get(name, name),
        options.vocab,
        options.added,
    )
    if source.match.problems:
        raise refusal(group_problems(source.match.problems))
    samples = sample_models([(d, None) for d in source.match.differences], ("finetuned", "base"))
    relation = relate(samples, "finetuned", "base")
    unrelated = None if relation is None else say(relation)
    lines = [*(() if unrelated is None else (unrelated,)), *source.vocabulary.warnings]
    return source, [_named(line) for line in lines]


def _renames(renames: Sequence[Rename]) -> list[Rename]:
    return [
        replace(each, role=_STANDS_FOR[each.role]) for each in renames if each.role in _STANDS_FOR
    ]


def _by_target_name(source: Source) -> dict[str, Difference]:
    """The differences direct − target by the target's names."""
    found: dict[str, Difference] = {}
    for difference in source.match.differences:
        name = difference.sources[1].name
        # A head of direct's own is compared with the target's embedding if the target ties them.
        if not is_head(difference.name) or is_head(name):
            found[name] = difference
    return found


def _with_direct(task: TensorTask, difference: Difference, source: Source) -> list[TensorTask]:
    other = unrounded(difference.sources[0])
    inputs = (*task.inputs, other)
    rows = _rows(difference, source, task.inputs[2])
    if rows is None:
        runs = tuple(_extended(run, run.rows[2]) for run in task.runs)
        return [replace(task, inputs=inputs, runs=runs)]
    if len(task.runs) == 1 and task.runs[0].count != len(rows):  # one run of one row, for all
        task = replace(task, runs=(Run(RunKind.GRAFT, 0, len(rows), (0, 0, 0)),))
    pieces = [piece for run in task.runs for piece in _split(run, rows)]
    found = []
    if any(has for _, has in pieces):
        kept = tuple(run if has else _left_out(run, 4) for run, has in pieces)
        found.append(replace(task, inputs=inputs, runs=kept))
    if any(not has and run.kind is RunKind.GRAFT for run, has in pieces):
        kept = tuple(_left_out(run, 3) if has else run for run, has in pieces)
        found.append(replace(task, runs=kept))
    return found


def _rows(difference: Difference, source: Source, target: StoredTensor) -> Rows | None:
    """Direct's row of each of the target's rows, −1 if it has none; None for the same row."""
    ours, theirs = difference.sources
    if not difference.vocabulary or not target.shape:
        return None
    runs = extract_runs(
        source.vocabulary.base_pairing, finetuned_rows=ours.shape[0], base_rows=theirs.shape[0]
    )
    rows = np.full(target.shape[0], _NONE, dtype=np.int64)
    for run in runs:
        if run.kind is RunKind.GRAFT:
            first, at = run.rows
            rows[at : at + run.count] = np.arange(first, first + run.count)
    same = len(rows) == ours.shape[0] and np.array_equal(rows, np.arange(len(rows)))
    return None if same else rows


def _split(run: Run, rows: Rows) -> Iterator[tuple[Run, bool]]:
    """Cut a run where direct's rows are not consecutive; each part with whether direct has it."""
    if run.kind is not RunKind.GRAFT:
        yield run, False
        return
    here = rows[run.rows[2] : run.rows[2] + run.count]
    before, after = here[:-1], here[1:]
    together = np.where(before < 0, after < 0, after == before + 1)
    edges = [0, *(np.flatnonzero(~together) + 1).tolist(), run.count]
    for start, stop in pairwise(edges):
        first = tuple(row + start for row in run.rows)
        part = Run(RunKind.GRAFT, run.start + start, stop - start, first)
        has = bool(here[start] >= 0)
        yield (_extended(part, int(here[start])) if has else part), has


def _extended(run: Run, row: int) -> Run:
    row = row if run.kind is RunKind.GRAFT else _NONE
    return Run(run.kind, run.start, run.count, (*run.rows, row))


def _left_out(run: Run, inputs: int) -> Run:
    return Run(RunKind.ZERO, run.start, run.count, (_NONE,) * inputs)


@contextmanager
def _naming_direct() -> Iterator[None]:
    """Give an error about finetuned and base the names that these models have here."""
    try:
        yield
    except DiffxferError as exc:
        exc.where = _named(exc.where) if exc.where in _STANDS_FOR.values() else exc.where
        exc.problem, exc.remedy = _named(exc.problem), _named(exc.remedy)
        if isinstance(exc, MatchError):
            exc.groups = tuple(
                replace(
                    group,
                    role=_named(group.role),
                    expected=_named(group.expected),
                    reason=_named(group.reason),
                    holders=tuple(map(_named, group.holders)),
                )
                for group in exc.groups
            )
        raise


def _named(text: str) -> str:
    names = {used: name for name, used in _STANDS_FOR.items()}
    return _WORD.sub(lambda word: names[word[0]], text)
