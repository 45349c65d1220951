"""Giving finetuned back bit for bit where the target is base itself.

Base + Δ is finetuned for nearly every element. A packed diff vector stores finetuned's bits of the
others. Its graft on another target is target + Δ there too, as `transfer` computes it, so these
bits count only if the target is base as a whole: then every tensor has the checksum that base had.
`transfer` has finetuned at hand, and copies it if base and target are the same files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.streaming.measure import measure_inputs
from diffxfer.streaming.plan import Operation, Plan, RunKind, digest_task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.jobs.run_options import RunOptions
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.streaming.plan import Run, TensorTask

_AT_ONCE = 1 << 24
"""Elements that are digested before the checksums are compared: most targets differ early."""


def target_is_base(
    pairs: Sequence[tuple[Difference, StoredTensor]], manifest: Manifest, run: RunOptions
) -> bool:
    """Whether a target is the base of a diff vector that needs to know.

    Args:
        pairs: its differences, each with the target's tensor that it is added to.
        manifest: its manifest.
        run: how the graft is run; a dry run reads nothing.

    Returns:
        Whether every tensor is base's. False without reading any if no difference has exceptions.

    Raises:
        CheckpointError: if the target cannot be read, or has changed.
    """
    if run.dry_run or not any(_is_incomplete(pair.sources[0].name, manifest) for pair, _ in pairs):
        return False
    if not run.stream:
        fetch_shards((spec.shard for _, spec in pairs), run.progress)
    for group in _groups(pairs):
        tasks = tuple(digest_task(spec.name, spec) for _, spec in group)
        inputs = {part.shard.path: part.shard for _, spec in group for part in spec.parts}
        results = measure_inputs(Plan(tasks, {}, tuple(inputs.values())), threads=run.threads)
        for (difference, _), result in zip(group, results, strict=True):
            entry = manifest.tensors.get(difference.sources[0].name)
            if entry is None or entry.base_checksum != result.checksum:
                return False
    return True


def give_back(tasks: Sequence[TensorTask], manifest: Manifest) -> list[TensorTask]:
    """The tasks of a graft on base, changed to give finetuned back bit for bit.

    Args:
        tasks: the tasks of the graft.
        manifest: the diff vector's manifest.
    """
    return [
        replace(task, operation=Operation.GIVE_BACK)
        if task.operation is Operation.APPLY
        and task.alpha == 1
        and _is_incomplete(task.inputs[0].name, manifest)
        else task
        for task in tasks
    ]


def copy_finetuned(tasks: Sequence[TensorTask]) -> list[TensorTask]:
    """The tasks of a transfer onto base itself, changed to give finetuned back bit for bit.

    Args:
        tasks: the tasks of the graft.
    """
    return [
        replace(task, runs=tuple(map(_copied, task.runs)))
        if task.operation is Operation.TRANSFER
        and task.alpha == 1
        and task.inputs[0].dtype == task.dtype
        else task
        for task in tasks
    ]


def _copied(run: Run) -> Run:
    return replace(run, kind=RunKind.ADD) if run.kind is RunKind.GRAFT else run


def _is_incomplete(name: str, manifest: Manifest) -> bool:
    """Whether base + Δ gives back all of a tensor but its exceptions."""
    entry = manifest.tensors.get(name)
    return entry is not None and bool(entry.exceptions)


def _groups(
    pairs: Sequence[tuple[Difference, StoredTensor]],
) -> Iterator[list[tuple[Difference, StoredTensor]]]:
    """The pairs, the smallest tensors first, in groups of limited size."""
    group: list[tuple[Difference, StoredTensor]] = []
    elements = 0
    for pair in sorted(pairs, key=lambda pair: pair[1].elements):
        group.append(pair)
        elements += pair[1].elements
        if elements >= _AT_ONCE:
            yield group
            group, elements = [], 0
    if group:
        yield group
