"""Whether a graft's target is a successor of the base, the base itself, or neither."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.match import Difference
from diffxfer.diffs.matching.names import is_known_vocabulary
from diffxfer.diffs.relations.relatedness import refuse_unrelated, relate, warn_of_relations
from diffxfer.diffs.relations.sampling import sample_graft, sample_models
from diffxfer.errors import listed
from diffxfer.streaming.plan import TensorTask, digest_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.relations.relatedness import Relation

_SUCCESSION = ("base", "target")
_TARGET_ONLY = "target of "
_ITSELF = "this target is the base itself: alpha 1 gives finetuned back"


@dataclass(frozen=True, slots=True)
class Kinship:
    """How the roles relate.

    Attributes:
        relations: one per pair of roles.
        warnings: likely mistakes.
        tasks: tasks that digest the target, if it seems to be the base itself.
        base_checksums: the checksums of base's tensors, by the names of those tasks.
    """

    relations: tuple[Relation, ...]
    warnings: list[str]
    tasks: Sequence[TensorTask]
    base_checksums: Mapping[str, str | None]


def kinship_of_graft(
    pairs: Sequence[tuple[Difference, StoredTensor]],
    diff: tuple[Path, Manifest] | None,
    *,
    allow_unrelated: bool,
) -> Kinship:
    """Compare base with target, and finetuned with base if both are checkpoints.

    Args:
        pairs: differences, each with the target's tensor that it is added to.
        diff: the diff vector and its manifest; None if Δ comes from two checkpoints.
        allow_unrelated: accept unrelated models.

    Returns:
        How the roles relate.

    Raises:
        RelatednessError: if two of them are unrelated, unless `allow_unrelated` is set.
        CheckpointError: if one cannot be read.
    """
    if diff is None:
        samples = sample_models(pairs, ("finetuned", "base", "target"))
        compared = [relate(samples, *roles) for roles in (("finetuned", "base"), _SUCCESSION)]
    else:
        samples = sample_graft(pairs, *diff)
        compared = [relate(samples, *_SUCCESSION)]
    relations = tuple(relation for relation in compared if relation is not None)
    if not allow_unrelated:
        refuse_unrelated(relations, "transfer" if diff is None else "apply")
    warnings = warn_of_relations(samples, relations)
    equal = next((r for r in relations if r.roles == _SUCCESSION and r.equal), None)
    if equal is None:
        return Kinship(relations, warnings, (), {})
    if diff is None:
        warnings.append(
            f"base and target are equal in all {equal.samples:,} sampled weights:"
            " if this target is the base itself, alpha 1 gives finetuned back"
        )
        return Kinship(relations, warnings, (), {})
    entries = diff[1].tensors
    read = [
        (difference, digest_task(_TARGET_ONLY + spec.name, spec))
        for difference, spec in pairs
        if spec.elements
    ]
    tasks = [task for _, task in read]
    # The diff vector stores a tied head under its embedding's name.
    known = {task.name: entries[d.sources[0].name].base_checksum for d, task in read}
    return Kinship(relations, warnings, tasks, known)


def kinship_of_diff(differences: Iterable[Difference], *, allow_unrelated: bool) -> Kinship:
    """Compare finetuned with base.

    Args:
        differences: their differences.
        allow_unrelated: accept unrelated models.

    Returns:
        How they relate.

    Raises:
        RelatednessError: if they are unrelated, unless `allow_unrelated` is set.
        CheckpointError: if one cannot be read.
    """
    pairs = [(difference, None) for difference in differences]
    samples = sample_models(pairs, ("finetuned", "base"))
    relation = relate(samples, "finetuned", "base")
    relations = () if relation is None else (relation,)
    if not allow_unrelated:
        refuse_unrelated(relations, "extract")
    return Kinship(relations, warn_of_relations(samples, relations), (), {})


def kinship_of_move(
    pairs: Iterable[tuple[StoredTensor, StoredTensor]], *, allow_unrelated: bool
) -> Kinship:
    """Compare the base that an adapter was made for with the target that it is moved to.

    Args:
        pairs: tensors of equal shapes, base's and the target's.
        allow_unrelated: accept unrelated models.

    Returns:
        How they relate.

    Raises:
        RelatednessError: if they are unrelated, unless `allow_unrelated` is set.
        CheckpointError: if one cannot be read.
    """
    differences = [
        (Difference(ours.name, (ours,), is_known_vocabulary(ours.name)), theirs)
        for ours, theirs in pairs
    ]
    samples = sample_models(differences, _SUCCESSION)
    relation = relate(samples, *_SUCCESSION)
    relations = () if relation is None else (relation,)
    if not allow_unrelated:
        refuse_unrelated(relations, "apply")
    return Kinship(relations, warn_of_relations(samples, relations), (), {})


def without_digests(kinship: Kinship) -> Kinship:
    """The same roles, once it is known that the target is the base itself.

    Args:
        kinship: how the roles relate; its tasks need not run any more.
    """
    return replace(kinship, warnings=[*kinship.warnings, _ITSELF], tasks=(), base_checksums={})


def warning_of_digests(kinship: Kinship, digests: Mapping[str, str]) -> str:
    """A warning that the target is the base itself, or nearly.

    Args:
        kinship: how the roles relate, with tasks that digested the target.
        digests: the checksums of these tasks by name.
    """
    known = kinship.base_checksums
    others = [name for name, checksum in known.items() if digests[name] != checksum]
    if not others:
        return _ITSELF
    names = listed([name.removeprefix(_TARGET_ONLY) for name in others])
    count = f"{len(others):,} tensors" if len(others) > 1 else "one tensor"
    return f"this target is the base itself except for {count}: {names}"
