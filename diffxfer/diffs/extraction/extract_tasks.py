"""From differences to tasks: what is computed for every tensor of a diff vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.diffs.artifact.samples import sample_indices, samples_per_tensor
from diffxfer.diffs.matching.names import is_head
from diffxfer.diffs.vocab.rows import extract_runs
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.match import Difference

BASE_ONLY = "base of "
"""How the task begins that digests a tensor of base which no other task reads in its own order."""


def extract_tasks(source: Source, dtype: str | None, last_shard: str) -> list[TensorTask]:
    """One task a difference, and those that only read.

    Args:
        source: finetuned and base.
        dtype: of the diff vector, as safetensors names it; None for finetuned's own dtypes.
        last_shard: where a difference goes whose tensor finetuned has not on disk.
    """
    differences = source.match.differences
    count = samples_per_tensor(len(differences))
    tasks: list[TensorTask] = []
    for difference in differences:
        task = _task(source, difference, dtype, last_shard, count)
        tasks.append(task)
        tasks += digest_base(task)
    tasks += [bring_task(spec, spec.shard.path.name) for spec in source.match.added]
    tasks += [compare(*pair) for pair in source.match.integers]
    return tasks


def bring_task(spec: TensorSpec, shard: str) -> TensorTask:
    """The task that carries over a tensor that only finetuned has, whole and unscaled.

    Args:
        spec: the tensor, as finetuned or a diff vector has it.
        shard: where it goes.
    """
    return TensorTask(
        name=spec.name,
        operation=Operation.BRING,
        inputs=(spec,),
        dtype=spec.dtype,
        shape=spec.shape,
        runs=whole(RunKind.COPY, 1),
        shard=shard,
    )


def _task(
    source: Source, difference: Difference, dtype: str | None, last_shard: str, samples: int
) -> TensorTask:
    ours, theirs = difference.sources
    # The Δ of a head that only base has on disk is stored under base's name, in the last shard.
    from_embedding = is_head(difference.name) and not is_head(ours.name)
    return TensorTask(
        name=difference.name,
        operation=Operation.SUBTRACT,
        inputs=(ours, theirs),
        dtype=dtype or ours.dtype,
        shape=ours.shape,
        runs=difference_runs(source, difference),
        shard=last_shard if from_embedding else ours.shard.path.name,
        sample=sample_indices(difference.name, ours.elements, samples),
    )


def difference_runs(source: Source, difference: Difference) -> tuple[Run, ...]:
    """Which rows of a difference are what; the inputs are (finetuned, base).

    Args:
        source: what it is a difference of.
        difference: one tensor of it.

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


def digest_base(task: TensorTask) -> list[TensorTask]:
    """The task that digests base's tensor, where another one cannot do it on the way.

    Args:
        task: the other one, whose inputs are finetuned, base and what it may read besides.
    """
    base = task.inputs[1]
    if _in_base_order(task):
        return []
    return [
        TensorTask(
            name=BASE_ONLY + task.name,
            operation=Operation.DIGEST,
            inputs=(base,),
            dtype=base.dtype,
            shape=base.shape,
            runs=whole(RunKind.GRAFT, 1),
        )
    ]


def _in_base_order(task: TensorTask) -> bool:
    """Whether base's tensor is read from its first byte to its last, so that it can be digested."""
    base = task.inputs[1]
    if len(task.runs) != 1 or task.runs[0].kind is not RunKind.GRAFT:
        return task.elements == 0 == base.elements
    return task.runs[0].rows[1] == 0 and task.elements == base.elements


def compare(finetuned: TensorSpec, base: TensorSpec) -> TensorTask:
    """The task that makes sure that two integer tensors are the same.

    Args:
        finetuned: one of them.
        base: the other, of the same dtype and shape.
    """
    return TensorTask(
        name=finetuned.name,
        operation=Operation.COMPARE,
        inputs=(finetuned, base),
        dtype=finetuned.dtype,
        shape=finetuned.shape,
        runs=whole(RunKind.GRAFT, 2),
    )
