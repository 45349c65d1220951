"""Pairing the tensors and the rows of tokens of three models, as `transfer` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.encodings.adapted import Adapted
from diffxfer.diffs.delta.from_checkpoints import from_checkpoints, read_roles
from diffxfer.diffs.extraction.extract import warn_of_one_model
from diffxfer.diffs.grafting.graft import label_roles
from diffxfer.diffs.grafting.pairing import (
    count_tied_head,
    match_output,
    names_to_choose,
    other_fates,
)
from diffxfer.diffs.grafting.tasks import graft_tasks
from diffxfer.diffs.jobs.report import FateGroup, group_fates
from diffxfer.diffs.matching.refusal import group_problems, refusal
from diffxfer.diffs.matching.role import notes_of_names
from diffxfer.diffs.relations.relatedness import (
    Relation,
    refuse_unrelated,
    relate,
    warn_of_relations,
)
from diffxfer.diffs.relations.sampling import sample_models
from diffxfer.diffs.vocab.relate import relate_to_target
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import RelatednessError
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile, StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.grafting.pairing import Output
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.diffs.matching.role import Role
    from diffxfer.diffs.matching.selection import Selection
    from diffxfer.diffs.vocab.pair_target import TargetPairing
    from diffxfer.probing.pair_options import PairOptions


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which tensors and rows of finetuned, base and target belong together.

    Attributes:
        roles: the three models.
        tasks: one per tensor that is measured, in the order of the target's files. Rows that not
            all three models have are `RunKind.ZERO`.
        rows_left_out: the numbers of rows that only one or two models have, by tensor and model.
        not_measured: the other tensors, and why.
        mode: how rows of tokens pair: ``"ids"``, ``"tokens"`` or ``"rows"``.
        relations: how finetuned and base, and base and target relate, by sampled elements.
        shards: every file that is read.
        warnings: one line each.
        notes: remarks on names; one line each.
    """

    roles: Mapping[str, Role]
    tasks: tuple[TensorTask, ...]
    rows_left_out: Mapping[str, Mapping[str, int]]
    not_measured: tuple[FateGroup, ...]
    mode: str
    relations: tuple[Relation, ...]
    shards: tuple[ShardFile, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def pair_models(named: Mapping[str, Path | str], options: PairOptions) -> Pairing:
    """Pair the tensors and rows of three models.

    Args:
        named: the folders or Hub ids of finetuned, base and target, by role.
        options: the options.

    Raises:
        DiffxferError: if one is not a sound checkpoint, or their tensors or tokens do not pair.
    """
    roles = read_roles(named, options.renames)
    roles["finetuned"] = with_every_tensor(roles["finetuned"])
    labels, selection = label_roles(roles), options.selection
    source = from_checkpoints(
        roles["finetuned"],
        roles["base"],
        selection,
        lambda name: labels.get(name, name),
        options.vocab,
        options.added,
    )
    selection.refuse_unused(names_to_choose(source, roles["target"], labels))
    output = match_output(source, roles["target"], selection, options.added)
    match = output.match
    tied = count_tied_head(match, output.head, selection)
    pairing, more = relate_to_target(
        source.vocabulary,
        read_tokenizer(roles["target"].checkpoint.folder),
        options.vocab,
        same_rows=all(ours.shape == theirs.shape for ours, theirs in match.grafts),
    )
    if pairing is not None:
        # A graft needs room for the tokens that finetuned added; their rows have no difference.
        pairing = replace(pairing, additions={}, kept={}, names={})
    if problems := [*source.match.problems, *match.problems]:
        raise refusal(group_problems(problems))
    tasks, rows = _tasks(source, output, pairing, selection)
    relations, doubts = _relations(match.grafts)
    fates = [*match.fates, *source.match.fates, *other_fates(source, output.role)]
    opened = [role.checkpoint for role in roles.values()]
    return Pairing(
        roles,
        tasks,
        rows,
        group_fates(fate for fate in fates if fate.kind != "grafted"),
        pairing.mode if pairing else "rows",
        relations,
        tuple(shard for each in opened for shard in each.weights.shards),
        (*warn_of_one_model(*opened), *doubts, *tied, *source.vocabulary.warnings, *more),
        tuple(notes_of_names([*roles.values()])),
    )


def with_every_tensor(role: Role) -> Role:
    """A model whose every tensor is compared, even those that an adapter does not change.

    Args:
        role: the model; if it is made of an adapter, matching would skip those tensors.
    """
    checkpoint = role.checkpoint
    weights = replace(checkpoint.weights, formats=())
    return replace(role, checkpoint=replace(checkpoint, weights=weights))


def unrounded(spec: StoredTensor) -> StoredTensor:
    """The tensor of an adapted model before it is rounded, so that Δ keeps its digits.

    Args:
        spec: any tensor.
    """
    return replace(spec, dtype="F64") if isinstance(spec, Adapted) else spec


def compared_rows(task: TensorTask) -> int:
    """The number of rows that all inputs of a task have; all if its runs are no rows."""
    return sum(run.count for run in task.runs if run.kind is RunKind.GRAFT)


def compared_elements(task: TensorTask) -> int:
    """The number of elements that all inputs of a task have."""
    return compared_rows(task) * task.row_elements


def _tasks(
    source: Source, output: Output, pairing: TargetPairing | None, selection: Selection
) -> tuple[tuple[TensorTask, ...], dict[str, dict[str, int]]]:
    """The tasks, and the rows that are left out.

    They are those of the graft, which knows every rule of pairing, with another operation.
    """
    made, _ = graft_tasks(source, output, pairing, selection, None)
    grafts = {task.name: task for task in made if task.shard is not None}
    tasks: list[TensorTask] = []
    rows: dict[str, dict[str, int]] = {}
    for difference, spec in output.match.grafts:
        task = _task(grafts[spec.name], difference, spec)
        compared = compared_elements(task)
        if difference.vocabulary and spec.shape:
            count = compared_rows(task)
            sizes = dict(zip(_ROLES, (*difference.sources, spec), strict=True))
            left = {role: each.shape[0] - count for role, each in sizes.items()}
            if any(left.values()):
                rows[spec.name] = {role: number for role, number in left.items() if number}
        if compared or not spec.elements:
            tasks.append(task)
    return tuple(sorted(tasks, key=_place)), rows


_ROLES = ("finetuned", "base", "target")


def _task(graft: TensorTask, difference: Difference, spec: StoredTensor) -> TensorTask:
    ours, theirs = difference.sources
    none = -1, -1, -1
    runs = [
        Run(RunKind.GRAFT, run.start, run.count, _rows(run.rows))
        if run.kind is RunKind.GRAFT
        else Run(RunKind.ZERO, run.start, run.count, none)
        for run in graft.runs
    ]
    inputs = (unrounded(ours), theirs, spec)
    shape = graft.shape
    return TensorTask(spec.name, Operation.DISTANCES, inputs, spec.dtype, shape, runs=tuple(runs))


def _rows(rows: tuple[int, ...]) -> tuple[int, ...]:
    """The first rows of a run in all three models; a stored Δ has those of finetuned and base."""
    return rows if len(rows) == len(_ROLES) else (rows[0], *rows)


def _place(task: TensorTask) -> tuple[Path, int]:
    part = task.inputs[2].parts[0]
    return part.shard.path, part.start


def _relations(
    pairs: Sequence[tuple[Difference, StoredTensor]],
) -> tuple[tuple[Relation, ...], list[str]]:
    """How the models relate, and warnings: unrelated models are no error here."""
    samples = sample_models(pairs, _ROLES)
    found = [relate(samples, *roles) for roles in (_ROLES[:2], _ROLES[1:])]
    relations = tuple(relation for relation in found if relation is not None)
    unrelated = {relation.roles: line for relation in relations if (line := say(relation))}
    others = [relation for relation in relations if relation.roles not in unrelated]
    return relations, [*unrelated.values(), *warn_of_relations(samples, others)]


def say(relation: Relation) -> str | None:
    """Say that two models are unrelated; None if they are related.

    Args:
        relation: how they relate.
    """
    try:
        refuse_unrelated((relation,), "transfer")
    except RelatednessError as exc:
        return exc.problem
    return None
