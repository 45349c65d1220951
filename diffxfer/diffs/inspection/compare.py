"""Comparing two checkpoints tensor by tensor, in one pass over both."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffxfer.checkpoints.companions import optional_object
from diffxfer.checkpoints.encodings.recognise import decoded
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.resolve import find
from diffxfer.checkpoints.stored import FLOATS, StoredTensor, TensorSpec
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.artifact.weights import diff_weights
from diffxfer.diffs.inspection.comparison import BytesContrast, Comparison, TensorContrast, Unlike
from diffxfer.diffs.inspection.inspect_page import comparison_page
from diffxfer.diffs.inspection.measures import Measure, cells, total
from diffxfer.diffs.inspection.places import places
from diffxfer.diffs.matching.names import pair_names
from diffxfer.errors import MatchError
from diffxfer.pages.report_folder import report_folder, write_report
from diffxfer.streaming.measure import measure_inputs
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, make_plan, whole
from diffxfer.streaming.run import check_run_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffxfer.checkpoints.resolve import Place
    from diffxfer.checkpoints.weights import Weights
    from diffxfer.diffs.inspection.places import Place as PlaceInModel
    from diffxfer.streaming.distribute import Cluster
    from diffxfer.streaming.statistics import TensorResult

    Pair: TypeAlias = tuple[StoredTensor, StoredTensor]


def compare_checkpoints(
    path: Path | str,
    other: Path | str,
    *,
    threads: int | None = None,
    stream: bool = False,
    output: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    cluster: Cluster | None = None,
) -> Comparison:
    """Compare two checkpoints, or two diff vectors: B − A, tensor by tensor.

    No difference is an error: tensors that cannot be compared are listed.

    Args:
        path: A, whose tensor names are used: a folder, or one on the Hub, ``"org/name"`` or
            ``"org/name@revision"``.
        other: B, named the same way.
        threads: how many workers; None for one a processor.
        stream: read from the Hub without downloading into its cache.
        output: a folder for `report.html`, a page with heat maps, and `report.json`, the same data.
        progress: called with the bytes done and the bytes in all.
        cluster: where the work is done in parts, such as `RayCluster`; None for this process.

    Returns:
        How they differ.

    Raises:
        DiffxferError: if one is not a checkpoint, is broken, or changes while it is read, or
            `output` has other files.

    Example:
        >>> compare_checkpoints("llama-3.0", "llama-3.1").norms.cosine  # doctest: +SKIP
    """
    began = time.perf_counter()
    check_run_options(threads, "cpu")
    found_at = [find(named, "a checkpoint or a diff vector") for named in (path, other)]
    folder = None if output is None else report_folder(output, [at.folder for at in found_at])
    ours, theirs = map(_open, found_at)
    warnings = list(_warnings(ours, theirs))
    found = _sort(ours, theirs, warnings)
    tasks = [_task(pair) for pair in found.floats] + [_bytes_task(pair) for pair in found.plain]
    plan = make_plan(tasks, (*ours.shards, *theirs.shards))
    if not stream:
        fetch_shards((spec.shard for task in tasks for spec in task.inputs), progress)
    results = measure_inputs(plan, threads=threads, progress=progress, cluster=cluster)
    comparison = Comparison(
        path=Path(path),
        other=Path(other),
        **_contrasts(found, results, places(ours.tensors)),
        bytes_read=plan.bytes_to_read,
        elapsed_s=round(time.perf_counter() - began, 3),
        warnings=tuple(warnings),
    )
    if folder is not None:
        write_report(folder, comparison_page(comparison), comparison.as_json())
    return comparison


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The tensors of A and B: pairs to compare by value, pairs to compare by byte, and the rest."""

    floats: list[Pair]
    plain: list[Pair]
    unlike: list[Pair]
    alone: tuple[tuple[str, ...], tuple[str, ...]]


def _sort(ours: Weights, theirs: Weights, warnings: list[str]) -> _Sorted:
    names = _pair(ours.tensors, theirs.tensors, warnings)
    floats: list[Pair] = []
    plain: list[Pair] = []
    unlike: list[Pair] = []
    # In file order, so that the disk is read sequentially.
    for spec in sorted(ours.tensors.values(), key=_place):
        if spec.name in names:
            pair = spec, theirs.tensors[names[spec.name]]
            if pair[0].shape != pair[1].shape:
                unlike.append(pair)
            elif all(each.dtype in FLOATS for each in pair):
                floats.append(pair)
            else:
                (plain if pair[0].dtype == pair[1].dtype else unlike).append(pair)
    left = ours.tensors.keys() - names.keys(), theirs.tensors.keys() - set(names.values())
    return _Sorted(floats, plain, unlike, (tuple(sorted(left[0])), tuple(sorted(left[1]))))


def _contrasts(
    found: _Sorted, results: Sequence[TensorResult], where: Mapping[str, PlaceInModel]
) -> dict[str, Any]:
    """The fields of a comparison that say how the tensors differ."""
    tensors = tuple(map(_contrast, found.floats, results))
    measured = [(where[each.name], each.measure) for each in tensors if each.measure is not None]
    return {
        "norms": total(measure for _, measure in measured),
        "cells": cells(measured),
        "tensors": tensors,
        "bytes_compared": tuple(map(_bytes_contrast, found.plain, results[len(tensors) :])),
        "unlike": tuple(map(_unlike, found.unlike)),
        "only_in_path": found.alone[0],
        "only_in_other": found.alone[1],
    }


def _open(place: Place) -> Weights:
    weights = decoded(open_weights(place), optional_object(place.folder, "config.json"))
    return diff_weights(weights, read_manifest(place.folder))


def _place(stored: StoredTensor) -> tuple[Path, int]:
    part = stored.parts[0]
    return part.shard.path, part.start


def _warnings(ours: Weights, theirs: Weights) -> Iterator[str]:
    identities = [[shard.identity for shard in role.shards] for role in (ours, theirs)]
    if identities[0] and identities[0] == identities[1]:
        yield "A and B are the same files"
    manifests = read_manifest(ours.folder), read_manifest(theirs.folder)
    diffs = [manifest is not None and manifest.kind == "diff" for manifest in manifests]
    if diffs[0] != diffs[1]:
        folder = (ours if diffs[0] else theirs).folder
        yield f"{folder} is a diff vector, but the other one is a complete model"


def _pair(
    ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor], warnings: list[str]
) -> dict[str, str]:
    """B's name of each of A's tensors that B has."""
    try:
        return pair_names(ours.keys(), theirs.keys(), ("A", "B"))
    except MatchError as exc:
        warnings.append(f"only tensors with equal names are compared: {exc.problem}")
        return {name: name for name in ours if name in theirs}


def _task(pair: Pair) -> TensorTask:
    ours = pair[0]
    runs = whole(RunKind.GRAFT, 2)
    return TensorTask(ours.name, Operation.CONTRAST, pair, ours.dtype, ours.shape, runs=runs)


def _bytes_task(pair: Pair) -> TensorTask:
    """Compare tensors as bytes: some dtypes take less than a byte per element."""
    ours, theirs = (
        TensorSpec(part.name, "U8", (part.nbytes,), part.shard, part.start)
        for stored in pair
        for part in stored.parts  # one: encodings hold floats, which are compared by value
    )
    return _task((ours, theirs))


def _contrast(pair: Pair, result: TensorResult) -> TensorContrast:
    ours, theirs = pair
    norms = result.delta_norm, result.base_norm, result.other_norm
    measure = Measure(1, ours.elements, *norms[:2], result.unchanged, norms[2])
    return TensorContrast(
        name=ours.name,
        other_name=theirs.name,
        dtype=ours.dtype,
        other_dtype=theirs.dtype,
        shape=ours.shape,
        unchanged=result.unchanged,
        measure=measure if all(map(math.isfinite, norms)) else None,
    )


def _bytes_contrast(pair: Pair, result: TensorResult) -> BytesContrast:
    ours = pair[0]
    return BytesContrast(ours.name, ours.dtype, ours.nbytes, result.unchanged)


def _unlike(pair: Pair) -> Unlike:
    found, other = (f"{spec.dtype} {spec.shape}" for spec in pair)
    return Unlike(pair[0].name, found, other)
