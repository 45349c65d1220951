"""From a matching to tasks: what is computed for every tensor of the graft."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import FLOATS
from diffxfer.diffs.matching.names import is_embedding, is_layer_embedding
from diffxfer.diffs.matching.ties import HeadState
from diffxfer.diffs.vocab.rows import graft_runs
from diffxfer.diffs.vocab.tensors import refuse_ambiguous
from diffxfer.errors import VocabularyError
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.matching.match import Difference, Side, TargetMatch
    from diffxfer.diffs.matching.selection import Selection
    from diffxfer.diffs.matching.ties import Head
    from diffxfer.diffs.source import Source
    from diffxfer.diffs.vocab.pair_target import TargetPairing


def graft_tasks(
    source: Source,
    match: TargetMatch,
    pairing: TargetPairing | None,
    selection: Selection,
    out_dtype: str | None,
    side: Side,
) -> tuple[list[TensorTask], int | None]:
    """One task a tensor of the target.

    Args:
        source: where Δ comes from.
        match: which difference belongs to which tensor.
        pairing: how rows of tokens pair.
        selection: the scales.
        out_dtype: as safetensors names it, None to keep the target's.
        side: the target's tensors, and which of them have rows that belong to tokens.

    Returns:
        The tasks, and the vocabulary's size if the embedding grows, or else that of Gemma 3n's
        layers.

    Raises:
        VocabularyError: if a tensor cannot have the rows that added tokens need, or may belong to
            tokens that have moved.
    """
    if pairing is not None:
        _refuse_short(match, side.vocabulary, pairing)
        _refuse_ambiguous(match, pairing, selection)
    tasks = [copy_task(spec, out_dtype) for spec in match.copies]
    grown: dict[str, int] = {}
    for difference, spec in match.grafts:
        task = _graft_task(source, difference, spec, pairing, selection, out_dtype)
        tasks.append(task)
        if difference.vocabulary and task.shape != spec.shape:
            grown[spec.name] = task.shape[0]
    # The config's size is the embedding's; where no name tells which that is, any of them has it.
    embedding = next((spec.name for _, spec in match.grafts if is_embedding(spec.name)), None)
    if embedding is None or embedding in grown:
        return tasks, grown.get(embedding or "", max(grown.values(), default=None))
    return tasks, next((grown[name] for name in grown if is_layer_embedding(name)), None)


def _refuse_short(
    match: TargetMatch, target_vocabulary: frozenset[str], pairing: TargetPairing
) -> None:
    fewest = min((s.shape[0] for d, s in match.grafts if d.vocabulary and s.shape), default=None)
    new = set(pairing.additions)
    new |= {place for place in pairing.kept if fewest is not None and place >= fewest}
    for spec in match.copies:
        if spec.name not in target_vocabulary or not new:
            continue
        place = max(new)
        if place in pairing.additions:
            token = f"{pairing.names[place]!r}, which finetuned added,"
        else:
            token = f"id {place}, whose row finetuned brings,"
        if place >= spec.shape[0]:
            problem = f"has no row for {token} since it is only copied"
        elif place in pairing.additions:
            problem = f"would keep a padding row for {token} since it is only copied"
        else:
            continue
        raise VocabularyError(
            spec.name,
            problem,
            "do not leave it out, or give --alpha-for with 0 for it: its added rows come then",
        )


def _refuse_ambiguous(match: TargetMatch, pairing: TargetPairing, selection: Selection) -> None:
    if pairing.in_place:
        return
    for difference, spec in match.grafts:
        if difference.vocabulary or selection.alpha_of(spec.name) == 0:
            continue
        if spec.name in match.ambiguous:
            refuse_ambiguous(spec.name, added=bool(pairing.additions))


def copy_task(spec: TensorSpec, out_dtype: str | None) -> TensorTask:
    """The task that copies a tensor of the target.

    Args:
        spec: the tensor.
        out_dtype: what its elements become if they are floats, None to keep them.
    """
    return TensorTask(
        name=spec.name,
        operation=Operation.COPY,
        inputs=(spec,),
        dtype=out_dtype if out_dtype and spec.dtype in FLOATS else spec.dtype,
        shape=spec.shape,
        runs=whole(RunKind.COPY, 1),
        shard=spec.shard.path.name,
    )


def with_tied_head(tasks: Sequence[TensorTask], target: Checkpoint, head: Head) -> list[TensorTask]:
    """The tasks as the target has its tensors; a head that copies its embedding goes on to do so.

    Args:
        tasks: one for every other tensor, or none.
        target: whose they are.
        head: what it has for one.
    """
    tasks = list(tasks)
    if tasks and head.state is HeadState.TIED and head.name is not None:
        embedding = next(task for task in tasks if task.name == head.embedding)
        shard = target.tensors[head.name].shard.path.name
        tasks.append(replace(embedding, name=head.name, shard=shard))
    order = {name: number for number, name in enumerate(target.tensors)}
    return sorted(tasks, key=lambda task: order[task.name])


def _graft_task(
    source: Source,
    difference: Difference,
    spec: TensorSpec,
    pairing: TargetPairing | None,
    selection: Selection,
    out_dtype: str | None,
) -> TensorTask:
    inputs = (*difference.sources, spec)
    runs: tuple[Run, ...] = whole(RunKind.GRAFT, len(inputs))
    shape = spec.shape
    if difference.vocabulary and spec.shape:
        two = len(difference.sources) == 2
        rows, found = graft_runs(
            pairing,
            source.vocabulary.base_pairing,
            finetuned_rows=difference.sources[0].shape[0],
            base_rows=difference.sources[1].shape[0] if two else None,
            target_rows=spec.shape[0],
        )
        runs, shape = tuple(found), (rows, *spec.shape[1:])
    alpha = selection.alpha_of(spec.name)
    if alpha == 0:
        runs = tuple(
            replace(run, kind=RunKind.COPY) if run.kind is RunKind.GRAFT else run for run in runs
        )
    if all(run.kind is RunKind.COPY for run in runs):
        return copy_task(spec, out_dtype)
    return TensorTask(
        name=spec.name,
        operation=source.operation,
        inputs=inputs,
        dtype=out_dtype or spec.dtype,
        shape=shape,
        alpha=alpha,
        runs=runs,
        shard=spec.shard.path.name,
    )
