"""Verifying that a folder that diffxfer wrote is unchanged, bit for bit."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.adapter import read_adapter
from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.distances import distances_as_json, recorded
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.artifact.weights import diff_tensors
from diffxfer.diffs.delta.from_checkpoints import read_roles
from diffxfer.diffs.extraction.extract_tasks import BASE_ONLY
from diffxfer.diffs.lora.distance import measure_distances
from diffxfer.diffs.lora.options import refuse_cluster
from diffxfer.diffs.matching.rename import parse_renames
from diffxfer.diffs.verification.damage import Survey, our_manifest, survey_folder
from diffxfer.diffs.verification.restore import (
    ITS_MODELS,
    Restored,
    distances,
    how_restored,
    is_merge,
    restore_tasks,
    sum_up,
)
from diffxfer.errors import Damage, DamageError, MatchError, OptionError
from diffxfer.streaming.measure import measure_inputs
from diffxfer.streaming.plan import Operation, digest_task, make_plan
from diffxfer.streaming.run import check_run_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.checkpoints.resolve import Place
    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.diffs.artifact.distances import Distance
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.matching.rename import Rename
    from diffxfer.diffs.matching.role import Role
    from diffxfer.streaming.distribute import Cluster
    from diffxfer.streaming.plan import TensorTask
    from diffxfer.streaming.statistics import TensorResult


_ANOTHER = "was changed: its checksum differs"
_OTHERS = "Δ itself is undamaged: give the base and the fine-tuned model that it was extracted from"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of verifying a folder that is undamaged.

    Attributes:
        command: ``"verify"``.
        path: the folder, or its id on the Hub.
        kind: ``"diff"``, ``"graft"``, ``"tuned"`` or ``"adapter"``.
        files: number of files checked besides the shards, including the manifest.
        shards: number of shards.
        tensors: number of tensors.
        bytes_read: bytes of the tensors read.
        elapsed_s: seconds from the call to the result.
        restored: how much of finetuned is given back by base + Δ; None without `finetuned`.
        distances: for an adapter or a lossy diff vector, how far base + Δ is from finetuned, by
            tensor of Δ: as measured, or without `finetuned` as the manifest records it.
        lossy: the form of a lossy diff vector.
    """

    command: str
    path: Path
    kind: str
    files: int
    shards: int
    tensors: int
    bytes_read: int
    elapsed_s: float
    restored: Restored | None
    distances: tuple[Distance, ...] | None = None
    lossy: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        from dataclasses import asdict

        found = {**asdict(self), "path": str(self.path)}
        if self.distances is not None:
            found["distances"] = distances_as_json(self.distances)
        return found


def verify(
    path: Path | str,
    *,
    base: Path | str | None = None,
    finetuned: Path | str | None = None,
    rename: Sequence[str] = (),
    threads: int | None = None,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cluster: Cluster | None = None,
) -> VerifyReport:
    """Read a folder that diffxfer wrote, and compare it with its manifest.

    Args:
        path: the folder, or its id on the Hub, ``"org/name[@revision]"``.
        base: for a diff vector, its base, named the same way: check that base + Δ gives
            `finetuned` back; for a lossy diff vector and for an adapter of any origin, measure how
            far base + Δ is from it.
        finetuned: the fine-tuned model that it was extracted from, named the same way.
        rename: ``"ROLE:REGEX=TEXT"``, the renames that `extract` was given.
        threads: number of workers; None for one per processor.
        stream: read from the Hub without downloading into its cache.
        progress: called with the bytes done and the total bytes.
        cluster: where the work is done in parts, such as `RayCluster`; None for this process.

    Returns:
        What was checked, if the folder is undamaged.

    Raises:
        DamageError: if it is damaged; the error's `damage` lists all that was found.
        DiffxferError: if it cannot be verified.

    Example:
        >>> verify("sft-diff").tensors  # doctest: +SKIP
    """
    began = time.perf_counter()
    _check(base, finetuned, threads)
    place = find(path, "a diff vector, a graft, an adapter or a tuned model")
    if base is not None and finetuned is not None and is_adapter(place):
        how = threads, stream, progress, cluster
        return _verify_adapter(began, place, finetuned, base, rename, how)
    manifest = our_manifest(place.folder, restoring=base is not None)
    survey = survey_folder(place, manifest)
    restoring = not survey.damage and base is not None  # not from a damaged folder
    models = (finetuned, base) if restoring else (None, None)
    roles = _restored_roles(manifest, *models, rename)
    tasks, inputs = _what_to_read(manifest, survey, roles)
    fetch_shards([] if stream else inputs, progress)
    if roles:
        _refuse_damaged_bytes(place.folder, manifest, survey, threads, progress, cluster)
    results = _run(tasks, inputs, threads, progress, cluster)
    merge = bool(roles) and is_merge(roles["finetuned"])
    _refuse_damage(place.folder, manifest, survey, results, restoring=restoring, of_merge=merge)
    found = _report(Path(path), manifest, tasks, results, restoring=bool(roles))
    return replace(found, elapsed_s=round(time.perf_counter() - began, 3))


def _report(
    path: Path,
    manifest: Manifest,
    tasks: list[TensorTask],
    results: Mapping[str, TensorResult],
    *,
    restoring: bool,
) -> VerifyReport:
    """What was checked in a folder that is undamaged."""
    return VerifyReport(
        command="verify",
        path=path,
        kind=manifest.kind,
        files=len(manifest.files) + 1,
        shards=len(manifest.shards),
        tensors=len(manifest.tensors),
        bytes_read=make_plan(tasks, ()).bytes_to_read,
        elapsed_s=0.0,
        restored=sum_up(tasks, results) if restoring else None,
        distances=(distances(tasks, results) if restoring else recorded(manifest)) or None,
        lossy=None if manifest.lossy is None else manifest.lossy.form,
    )


def _verify_adapter(
    began: float,
    place: Place,
    finetuned: Path | str,
    base: Path | str,
    rename: Sequence[str],
    how: tuple[int | None, bool, Callable[[int, int], None] | None, Cluster | None],
) -> VerifyReport:
    """Verify an adapter, as far as it has a manifest, and measure its distance from a fine-tune."""
    threads, stream, progress, cluster = how
    refuse_cluster(cluster)
    adapter = read_adapter(place)
    renames = parse_renames(rename, ("finetuned", "base"))
    roles = read_roles({"finetuned": finetuned, "base": base}, renames)
    if not stream:
        shards = [shard for r in roles.values() for shard in r.checkpoint.weights.shards]
        fetch_shards([adapter.shard, *shards], progress)
    read, survey = 0, Survey()
    manifest = read_manifest(place.folder)
    if manifest is not None:
        survey = survey_folder(place, manifest)
        tasks = [digest_task(spec.name, spec) for spec in survey.tensors.values()]
        results = _run(tasks, [adapter.shard], threads, progress)
        _refuse_damage(place.folder, manifest, survey, results, restoring=False)
        read = make_plan(tasks, ()).bytes_to_read
    measured = measure_distances(adapter, roles["finetuned"], roles["base"], progress)
    read += sum(spec.nbytes for r in roles.values() for spec in r.checkpoint.tensors.values())
    return VerifyReport(
        command="verify",
        path=Path(place.label),
        kind="adapter",
        files=0 if manifest is None else len(manifest.files) + 1,
        shards=1,
        tensors=0 if manifest is None else len(manifest.tensors),
        bytes_read=read,
        elapsed_s=round(time.perf_counter() - began, 3),
        restored=None,
        distances=measured,
    )


def _what_to_read(
    manifest: Manifest, survey: Survey, roles: Mapping[str, Role]
) -> tuple[list[TensorTask], list[ShardFile]]:
    """The tasks that read the folder's tensors and those of the models, and the shards read."""
    shards = [spec.shard for spec in survey.tensors.values()]
    if not roles:
        return [digest_task(spec.name, spec) for spec in survey.tensors.values()], shards
    tasks, more = restore_tasks(manifest, diff_tensors(survey.tensors, manifest), **roles)
    return tasks, [*shards, *more]


def _check(base: Path | str | None, finetuned: Path | str | None, threads: int | None) -> None:
    check_run_options(threads, "cpu")
    given, lacking = "--base", "--finetuned"
    if base is None:
        given, lacking = lacking, given
    if (base is None) != (finetuned is None):
        raise OptionError(given, f"proves nothing without {lacking}", f"give {lacking} too")


def _restored_roles(
    manifest: Manifest,
    finetuned: Path | str | None,
    base: Path | str | None,
    rename: Sequence[str],
) -> dict[str, Role]:
    if finetuned is None or base is None:
        return {}
    named = {"finetuned": finetuned, "base": base}
    return read_roles(named, _given_renames(manifest, rename))


def _given_renames(manifest: Manifest, rename: Sequence[str]) -> tuple[Rename, ...]:
    """The user's renames; patterns in the manifest are not trusted, so they are not run."""
    given = manifest.command.get("rename")
    if isinstance(given, list) and not rename:
        options = " ".join(f"--rename '{option}'" for option in given)
        problem = f"is needed, since this diff vector was extracted with {options}"
        raise OptionError(
            "--rename", problem, "give the same options, if you trust who extracted it"
        )
    return parse_renames(rename, ("finetuned", "base"))


def _run(
    tasks: Sequence[TensorTask],
    inputs: Sequence[ShardFile],
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    cluster: Cluster | None = None,
) -> dict[str, TensorResult]:
    """The results of the tensors to verify, by name."""
    plan = make_plan(tasks, tuple({shard.path: shard for shard in inputs}.values()))
    try:
        results = measure_inputs(plan, threads=threads, progress=progress, cluster=cluster)
    except MatchError as exc:  # integers that differ: `extract` would have refused them
        exc.remedy = ITS_MODELS
        raise
    return {
        task.name: result
        for task, result in zip(plan.tasks, results, strict=True)
        if task.operation is not Operation.COMPARE
    }


def _refuse_damaged_bytes(
    folder: Path,
    manifest: Manifest,
    survey: Survey,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    cluster: Cluster | None,
) -> None:
    """Refuse a packed diff vector whose bytes were changed: they may decode to anything."""
    if manifest.packing is None:
        return
    results = _run(*_what_to_read(manifest, survey, {}), threads, progress, cluster)
    _refuse_damage(folder, manifest, survey, results, restoring=False)


def _refuse_damage(
    folder: Path,
    manifest: Manifest,
    survey: Survey,
    results: Mapping[str, TensorResult],
    *,
    restoring: bool,
    of_merge: bool = False,
) -> None:
    found = []
    for name, spec in survey.tensors.items():
        entry, result = manifest.tensors[name], results[name]
        base_only = results.get(BASE_ONLY + name)
        problem = None
        if restoring:
            problem = how_restored(entry, result, base_only, is_merge=of_merge)
        stored = entry.checksum if restoring else entry.stored or entry.checksum
        if result.checksum != stored:
            problem = _ANOTHER
        if problem is not None:
            found.append(Damage(spec.shard.path.name, name, problem))
    if survey.damage or found:
        told = not survey.damage and all(d.problem != _ANOTHER for d in found)
        remedy = _OTHERS if told else "make or download it again"
        raise _refusal(folder, [*survey.damage, *found], remedy)


def _refusal(folder: Path, damage: Sequence[Damage], remedy: str) -> DamageError:
    ordered = sorted(damage, key=lambda found: (found.file, found.tensor))
    what = f"{len(damage):,} problems" if len(damage) > 1 else "1 problem"
    return DamageError(
        folder,
        f"{what} found, such as {ordered[0]}",
        remedy,
        ordered,
    )
