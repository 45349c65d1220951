"""Turning differences into tasks: what is computed for each tensor of a diff vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_WEIGHTS
from diffxfer.diffs.artifact.samples import sample_indices, samples_per_tensor
from diffxfer.diffs.delta.difference_rows import difference_runs, stored_delta
from diffxfer.diffs.matching.names import is_head
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, digest_task, whole

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.match import Difference

BASE_ONLY = "base of "
"""Prefix of a task that digests a tensor of base because no other task reads it in order."""


def extract_tasks(source: Source, dtype: str | None, last_shard: str) -> list[TensorTask]:
    """One task per difference, and the tasks that only read.

    Args:
        source: finetuned and base.
        dtype: of the diff vector, as safetensors names it; None for finetuned's own dtypes.
        last_shard: the shard for the difference of a tensor that finetuned does not store.
    """
    differences = source.match.differences
    count = samples_per_tensor(len(differences))
    tasks: list[TensorTask] = []
    for difference in differences:
        task = _task(source, difference, dtype, last_shard, count)
        tasks.append(task)
        tasks += digest_base(task)
    tasks += [bring_task(spec, _shard_of(spec, last_shard)) for spec in source.match.added]
    tasks += [compare(*pair) for pair in source.match.integers]
    return tasks


def bring_task(spec: StoredTensor, shard: str) -> TensorTask:
    """The task that copies a tensor that only finetuned has, whole and unscaled.

    Args:
        spec: the tensor in finetuned or in a diff vector.
        shard: the output shard.
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
    # If only base stores a head, its Δ is stored under base's name, in the last shard.
    from_embedding = is_head(difference.name) and not is_head(ours.name)
    runs = difference_runs(source, difference)
    delta = stored_delta(difference, runs)
    return TensorTask(
        name=difference.name,
        operation=Operation.SUBTRACT if delta is None else Operation.STORE,
        inputs=(delta or ours, theirs),
        dtype=dtype or ours.written_dtype,
        shape=ours.shape,
        runs=runs,
        shard=last_shard if from_embedding else _shard_of(ours, theirs.shard.path.name),
        sample=sample_indices(difference.name, ours.elements, samples),
    )


def _shard_of(ours: StoredTensor, otherwise: str) -> str:
    """The output shard of a tensor: finetuned's, unless that is the file of an adapter."""
    name = ours.shard.path.name
    return otherwise if name == ADAPTER_WEIGHTS else name


def digest_base(task: TensorTask) -> list[TensorTask]:
    """The task that digests base's tensor, if `task` cannot digest it while it reads it.

    Args:
        task: a task whose first two inputs are finetuned's and base's tensors.
    """
    base = task.inputs[1]
    if _in_base_order(task):
        return []
    return [digest_task(BASE_ONLY + task.name, base)]


def _in_base_order(task: TensorTask) -> bool:
    """Whether the task reads base's tensor in order from end to end, and so can digest it."""
    base = task.inputs[1]
    if len(task.runs) != 1 or task.runs[0].kind is not RunKind.GRAFT:
        return task.elements == 0 == base.elements
    return task.runs[0].rows[1] == 0 and task.elements == base.elements


def compare(finetuned: StoredTensor, base: StoredTensor) -> TensorTask:
    """The task that checks that two integer tensors are equal.

    Args:
        finetuned: finetuned's tensor.
        base: base's tensor, of the same dtype and shape.
    """
    return TensorTask(
        name=finetuned.name,
        operation=Operation.COMPARE,
        inputs=(finetuned, base),
        dtype=finetuned.dtype,
        shape=finetuned.shape,
        runs=whole(RunKind.GRAFT, 2),
    )
