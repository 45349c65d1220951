"""Refusing inputs that changed since their checksums were written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.errors import ArtifactError
from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.streaming.plan import Plan
    from diffxfer.streaming.statistics import TensorResult


def refuse_damaged(plan: Plan, results: Sequence[TensorResult]) -> None:
    """Refuse a diff vector of which a tensor does not have the checksum in its manifest.

    Args:
        plan: the plan, with the expected checksums.
        results: the result of each task.

    Raises:
        ArtifactError: for the first one.
    """
    for task, result in zip(plan.tasks, results, strict=True):
        if task.expected is None:
            continue
        delta = task.inputs[0]
        silent = task.operation is Operation.DIGEST
        found = result.checksum if silent else result.input_checksum
        if found is not None and found != task.expected:
            problem = f"{delta.name} is damaged: it does not have the checksum in the manifest"
            remedy = "run diffxfer verify on the diff vector, and download or make it again"
            raise ArtifactError(delta.shard.path, problem, remedy)
