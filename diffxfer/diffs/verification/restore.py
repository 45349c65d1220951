"""Checking that base + Δ gives finetuned back bit for bit; counts the elements that differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.artifact.distances import Distance
from diffxfer.diffs.delta.difference_rows import difference_runs
from diffxfer.diffs.delta.from_adapter import LORA
from diffxfer.diffs.delta.from_artifact import refuse_integers
from diffxfer.diffs.delta.from_checkpoints import from_checkpoints
from diffxfer.diffs.extraction.extract_tasks import compare, digest_base
from diffxfer.diffs.matching.refusal import group_problems, refusal
from diffxfer.diffs.matching.selection import Selection
from diffxfer.errors import MatchError, VocabularyError
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, digest_task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.stored import ShardFile, StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest, TensorEntry
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.role import Role
    from diffxfer.streaming.statistics import TensorResult

ITS_MODELS = "give the two models that it was extracted from"
"""The remedy if finetuned and base are not the models of a diff vector."""
_RESTORING = Operation.RESTORE, Operation.APPROACH
_ALIKE = 1e-6
"""Sums of squares differ in their last digits between processors."""


@dataclass(frozen=True, slots=True)
class Restored:
    """How much of finetuned is given back by base + Δ.

    Attributes:
        elements: number of elements compared.
        unpaired: number of elements not compared, in rows that belong to no token of base.
        inexact: number of elements that differ, by tensor; tensors without any are left out.
    """

    elements: int
    unpaired: int
    inexact: Mapping[str, int]


def restore_tasks(
    manifest: Manifest,
    tensors: Mapping[str, StoredTensor],
    *,
    finetuned: Role,
    base: Role,
) -> tuple[list[TensorTask], tuple[ShardFile, ...]]:
    """The tasks that compare base + Δ with finetuned.

    Args:
        manifest: the manifest of the diff vector.
        tensors: Δ.
        finetuned: the checkpoint that the diff vector was made from.
        base: that checkpoint's base.

    Returns:
        A task for every tensor of Δ, and the tasks that digest base's tensors or compare
        integers; and the shards of both checkpoints.

    Raises:
        ArtifactError: if a tensor of Δ cannot be a difference.
        MatchError: if the tensors of finetuned and base are not those of Δ.
        DiffxferError: if their names or tokens cannot be paired.
    """
    whole = frozenset(manifest.added_tensors)
    refuse_integers({name: spec for name, spec in tensors.items() if name not in whole})
    try:
        source = from_checkpoints(
            finetuned,
            base,
            _AsExtracted.by(manifest),
            lambda name: name,
            str(manifest.command.get("vocab", "auto")),
            str(manifest.command.get("added", "refuse")),
        )
        if source.match.problems:
            raise refusal(group_problems(source.match.problems))
    except (MatchError, VocabularyError) as exc:
        exc.remedy = ITS_MODELS  # the options that `extract` would need are not options of `verify`
        raise
    _refuse_others(source, manifest, tensors)
    operation = Operation.RESTORE if manifest.lossy is None else Operation.APPROACH
    tasks = [compare(*pair) for pair in source.match.integers]
    for spec in source.match.added:
        tasks += [compare(tensors[spec.name], spec), digest_task(spec.name, tensors[spec.name])]
    for difference in source.match.differences:
        spec = tensors[difference.name]
        task = TensorTask(
            name=difference.name,
            operation=operation,
            inputs=(*difference.sources, spec),
            dtype=spec.dtype,
            shape=spec.shape,
            runs=difference_runs(source, difference),
        )
        tasks += [task, *digest_base(task)]
    return tasks, source.shards


@dataclass(frozen=True, slots=True)
class _AsExtracted(Selection):
    """The tensors that `extract` selected, by name.

    The manifest also has the patterns, but it is not trusted: a pattern could take forever to
    match. So the patterns are not run.

    Attributes:
        left_out: finetuned's tensors that `extract` left out.
        chose: whether `extract` was given any pattern, and so may have dropped tensors that only
            one role has.
    """

    left_out: frozenset[str] = frozenset()
    chose: bool = False

    @classmethod
    def by(cls, manifest: Manifest) -> _AsExtracted:
        """The selection that the manifest states."""
        patterns = (manifest.command.get(name) for name in ("include", "exclude", "allow_missing"))
        return cls(left_out=frozenset(manifest.left_out), chose=any(patterns))

    def selects(self, name: str) -> bool:
        """Whether a tensor was extracted."""
        return name not in self.left_out

    def may_be_missing(self, name: str) -> bool:  # noqa: ARG002 as the one it stands for
        """Whether a role may lack a tensor; `_refuse_others` checks later that Δ lacks it too."""
        return self.chose


def _refuse_others(source: Source, manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
    shapes = {difference.name: difference.shape for difference in source.match.differences}
    shapes |= {spec.name: spec.shape for spec in source.match.added}
    odd = sorted(shapes.keys() ^ manifest.tensors.keys())
    odd += [name for name, spec in tensors.items() if shapes.get(name) != spec.shape]
    if odd:
        raise MatchError(
            (),
            f"finetuned and base are not the models of this diff vector: {odd[0]} is not in all"
            f" three, or has another shape ({len(odd)} such tensors)",
            ITS_MODELS,
        )


def is_merge(finetuned: Role) -> bool:
    """Whether finetuned is base with an adapter: its Δ is known before the sum is rounded.

    Args:
        finetuned: the checkpoint that the diff vector was made from.
    """
    return LORA in finetuned.checkpoint.weights.formats


def how_restored(
    entry: TensorEntry,
    result: TensorResult,
    base_only: TensorResult | None,
    *,
    is_merge: bool = False,
) -> str | None:
    """How the results differ from the manifest, None if they agree with it.

    Args:
        entry: the manifest's entry for the tensor.
        result: the result of its task.
        base_only: the result of the task that digests base's tensor alone, if there is one.
        is_merge: whether the manifest's error is that of an adapter's Δ, and so another one.
    """
    checksum = result.input_checksum if base_only is None else base_only.checksum
    if None not in (entry.base_checksum, checksum) and entry.base_checksum != checksum:
        return "base has different values than at extraction"
    if entry.inexact is not None and entry.inexact != result.inexact:
        return (
            f"base + Δ does not give back {result.inexact:,} elements of finetuned bit for bit,"
            f" but the manifest counts {entry.inexact:,}"
        )
    if entry.error_norm is not None and result.sums and not is_merge:
        error = math.sqrt(result.sums[0])
        if math.isfinite(error) and not math.isclose(
            error, entry.error_norm, rel_tol=_ALIKE, abs_tol=1e-300
        ):
            return (
                f"base + Δ is {error:.9g} from finetuned, but the manifest says"
                f" {entry.error_norm:.9g}"
            )
    return None


def distances(tasks: list[TensorTask], results: Mapping[str, TensorResult]) -> tuple[Distance, ...]:
    """How far base + Δ of a lossy diff vector is from finetuned, by tensor.

    Args:
        tasks: the tasks of `restore_tasks`.
        results: their results, by task name.
    """
    found = {t.name: results[t.name].sums for t in tasks if t.operation is Operation.APPROACH}
    return tuple(
        Distance(name, *map(math.sqrt, sums or (0.0, 0.0)))
        for name, sums in found.items()
        if all(map(math.isfinite, sums))
    )


def sum_up(tasks: list[TensorTask], results: Mapping[str, TensorResult]) -> Restored:
    """The total over all tensors.

    Args:
        tasks: the tasks of `restore_tasks`.
        results: their results, by task name.
    """
    tasks = [task for task in tasks if task.operation in _RESTORING]
    unpaired = sum(
        run.count * task.row_elements
        for task in tasks
        for run in task.runs
        if run.kind is RunKind.ZERO
    )
    inexact = {t.name: results[t.name].inexact for t in tasks if results[t.name].inexact}
    return Restored(sum(task.elements for task in tasks) - unpaired, unpaired, inexact)
