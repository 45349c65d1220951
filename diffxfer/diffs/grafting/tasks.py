"""Turning a matching into tasks: what is computed for each tensor of the graft."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import read_config
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.delta.difference_rows import stored_delta
from diffxfer.diffs.extraction.extract_tasks import bring_task
from diffxfer.diffs.grafting.output_names import stored_names, wraps
from diffxfer.diffs.matching.names import is_embedding, is_layer_embedding
from diffxfer.diffs.matching.parts import body_of, is_under
from diffxfer.diffs.matching.ties import HeadState
from diffxfer.diffs.matching.wrappers import without_modules
from diffxfer.diffs.vocab.rows import graft_runs
from diffxfer.diffs.vocab.tensors import refuse_ambiguous, sort_tensors
from diffxfer.errors import MatchError, VocabularyError
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask, digest_task, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.grafting.pairing import Output
    from diffxfer.diffs.matching.match import Difference, TargetMatch
    from diffxfer.diffs.matching.selection import Selection
    from diffxfer.diffs.vocab.pair_target import TargetPairing


CHECKED = "difference of "
"""Prefix of a task that checks a tensor of the diff vector."""


def graft_tasks(
    source: Source,
    output: Output,
    pairing: TargetPairing | None,
    selection: Selection,
    out_dtype: str | None,
) -> tuple[list[TensorTask], int | None]:
    """One task per tensor of the target.

    Args:
        source: the source of Δ.
        output: which difference belongs to which tensor.
        pairing: how rows of tokens pair.
        selection: the scales.
        out_dtype: as safetensors names it, None to keep the target's.

    Returns:
        The tasks, and the new vocabulary size: the embedding's if it grows, else that of Gemma
        3n's per-layer embedding if that grows, else None.

    Raises:
        VocabularyError: if a tensor lacks rows that added tokens need, or if its rows may belong
            to tokens whose ids changed.
    """
    match = output.match
    if pairing is not None:
        _refuse_short(match, output.side.vocabulary, pairing)
        _refuse_ambiguous(match, pairing, selection)
    tasks = [copy_task(spec, out_dtype) for spec in match.copies]
    grown: dict[str, int] = {}
    for difference, spec in match.grafts:
        task = _graft_task(source, difference, spec, pairing, selection, out_dtype)
        tasks.append(task)
        tasks += _check_tasks(task)
        if difference.vocabulary and task.shape != spec.shape:
            grown[spec.name] = task.shape[0]
    _refuse_moved_head(source, output, pairing, tasks)
    # The config states the embedding's size. If no name identifies the embedding, take the
    # largest vocabulary tensor that grows.
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
            token = f"id {place}, whose row comes from finetuned,"
        if place >= spec.shape[0]:
            problem = f"has no row for {token} because it is only copied"
        elif place in pairing.additions:
            problem = f"would keep a padding row for {token} because it is only copied"
        else:
            continue
        raise VocabularyError(
            spec.name,
            problem,
            "do not leave it out; for its added rows alone, give --alpha-for with 0 for it instead",
        )


def _refuse_moved_head(
    source: Source, output: Output, pairing: TargetPairing | None, tasks: Sequence[TensorTask]
) -> None:
    """Refuse to bring a tensor with rows of tokens if the target's ids or row count differ."""
    if not output.added:
        return
    by_name = {task.name: task for task in tasks}
    sizes = {
        (d.shape[0], by_name[spec.name].shape[0])
        for d, spec in output.match.grafts
        if d.vocabulary and d.shape
    }
    moved = pairing is not None and any(
        ours != theirs for ours, theirs in (*pairing.translate.items(), *pairing.additions.items())
    )
    tensors = {spec.name: spec for spec in output.added}
    for name in sorted(set().union(*sort_tensors(tensors, read_config(source.behaviour)))):
        other = next((new for old, new in sizes if old in tensors[name].shape and old != new), None)
        if moved or other is not None:
            problem = "would be copied whole, but its rows belong to tokens, " + (
                "which have other ids in the target"
                if moved
                else f"and the output has {other:,} tokens, unlike finetuned"
            )
            raise VocabularyError(name, problem, "leave it out with --added drop")


def _refuse_ambiguous(match: TargetMatch, pairing: TargetPairing, selection: Selection) -> None:
    if pairing.in_place:
        return
    for difference, spec in match.grafts:
        if difference.vocabulary or selection.alpha_of(spec.name) == 0:
            continue
        if spec.name in match.ambiguous:
            refuse_ambiguous(spec.name, added=bool(pairing.additions))


def copy_task(spec: StoredTensor, out_dtype: str | None) -> TensorTask:
    """The task that copies a tensor of the target.

    Args:
        spec: the tensor.
        out_dtype: the output's dtype if the tensor holds floats; None to keep the tensor's.
    """
    return TensorTask(
        name=spec.name,
        operation=Operation.COPY,
        inputs=(spec,),
        dtype=out_dtype if out_dtype and spec.dtype in FLOATS else spec.written_dtype,
        shape=spec.shape,
        runs=whole(RunKind.COPY, 1),
        shard=spec.shard.path.name,
    )


def whole_model(
    tasks: Sequence[TensorTask], output: Output, out_dtype: str | None
) -> list[TensorTask]:
    """The tasks of a whole model: the target's tensors as it stores them, and those brought.

    Args:
        tasks: one for every tensor that is grafted or copied, or none.
        output: the matching, with the head, the buffers and the tensors that are brought.
        out_dtype: as safetensors names it, None to keep each tensor's own.

    Raises:
        MatchError: if a tensor that is brought has the name of another tensor.
    """
    if not tasks:
        return []
    silent = [task for task in tasks if task.shard is None]
    role, target = output.role, output.role.checkpoint
    by_name = {task.name: task for task in tasks if task.shard is not None}
    copies = dict(output.match.shared)
    if output.head.state is HeadState.TIED and output.head.name is not None:
        copies[output.head.name] = output.head.embedding or ""
    for name, same in copies.items():
        shard = target.tensors[name].shard.path.name
        by_name[name] = replace(by_name[same], name=name, shard=shard)
    for name, spec in role.buffers.items():
        by_name[name] = replace(copy_task(spec, None), operation=Operation.KEEP)
    names = stored_names(output)
    order = {name: number for number, name in enumerate((*target.tensors, *role.buffers))}
    placed = sorted(by_name.values(), key=lambda task: order[task.name])
    placed = [
        replace(task, name=new) if (new := names(task.name)) != task.name else task
        for task in placed
    ]
    taken = {task.name for task in placed}
    for spec, name in _brought_names(output, names):
        if name in taken:
            problem = f"{name} comes from finetuned, but the target has another tensor of that name"
            raise MatchError((), problem, f"leave it out with --exclude '{re.escape(spec.name)}'")
        taken.add(name)
        task = bring_task(spec, target.weights.shards[-1].path.name)
        dtype = out_dtype if out_dtype and spec.dtype in FLOATS else spec.written_dtype
        placed.append(replace(task, name=name, dtype=dtype))
    return [*silent, *placed]


def _brought_names(
    output: Output, names: Callable[[str], str]
) -> Iterator[tuple[StoredTensor, str]]:
    """The tensors that finetuned brings, each with its output name under the target's prefix."""
    if not output.added:
        return
    ours = body_of(difference.name for difference, _ in output.match.grafts)
    theirs = body_of(names(spec.name) for _, spec in output.match.grafts)
    outer = _outer(ours, theirs)
    wrapped = any(wraps(difference.name, spec.name) for difference, spec in output.match.grafts)
    for spec in output.added:
        name = spec.name
        if name in output.match.named:
            name = names(output.match.named[name])
        elif is_under(name, ours):
            name = _moved(name, ours, theirs)
        elif is_under(name, outer[0]) or not outer[0]:
            name = _moved(name, *outer)
        yield spec, without_modules(name) if wrapped else name


def _outer(ours: str, theirs: str) -> tuple[str, str]:
    """The modules that enclose two bodies: ``("", "thinker")`` for ``model``, ``thinker.model``."""
    one, other = ours.split("."), theirs.split(".")
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    # If only the bodies' own names differ, no module encloses them.
    return (".".join(one), ".".join(other)) if len(one) != len(other) else ("", "")


def _moved(name: str, old: str, new: str) -> str:
    """Move a name from the module `old` to the module `new`; "" is the top level."""
    inner = name[len(old) + 1 :] if old else name
    return f"{new}.{inner}" if new else inner


def _graft_task(
    source: Source,
    difference: Difference,
    spec: StoredTensor,
    pairing: TargetPairing | None,
    selection: Selection,
    out_dtype: str | None,
) -> TensorTask:
    inputs, operation = (*difference.sources, spec), source.operation
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
    delta = stored_delta(difference, runs)
    if delta is not None:
        inputs, operation = (delta, spec), Operation.APPLY
        runs = tuple(replace(run, rows=run.rows[::2]) for run in runs)
    known = source.checksums.get(difference.sources[0].name)
    return TensorTask(
        name=spec.name,
        operation=operation,
        inputs=inputs,
        dtype=out_dtype or spec.written_dtype,
        shape=shape,
        alpha=alpha,
        runs=runs,
        shard=spec.shard.path.name,
        expected=known if inputs[0].elements else None,
    )


def _check_tasks(task: TensorTask) -> list[TensorTask]:
    """The task that checks Δ against its checksum, if `task` does not do so itself."""
    return [] if task.expected is None or checks_itself(task) else [check_task(task)]


def checks_itself(task: TensorTask) -> bool:
    """Whether a task checks Δ against its checksum, since it reads all of it in order.

    Args:
        task: a task that adds Δ.
    """
    whole_delta = len(task.runs) == 1 and task.elements == task.inputs[0].elements
    return task.expected is not None and whole_delta


def check_task(task: TensorTask) -> TensorTask:
    """The task that checks Δ against its checksum, and writes nothing.

    Args:
        task: a task that adds Δ, whose checksum is known.
    """
    return digest_task(CHECKED + task.name, task.inputs[0], task.expected)
