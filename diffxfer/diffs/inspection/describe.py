"""Describing a folder of weights from headers, configs and the manifest alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.adapter import read_adapter
from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.companions import list_companions, optional_object
from diffxfer.checkpoints.encodings.recognise import decoded
from diffxfer.checkpoints.quantized import refuse_quantized
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.distances import recorded
from diffxfer.diffs.artifact.kind import require_diff
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.artifact.weights import diff_weights
from diffxfer.diffs.inspection.adapter import adapter_facts
from diffxfer.diffs.inspection.description import Inspection, TensorGroup
from diffxfer.diffs.inspection.inspect_page import inspection_page
from diffxfer.diffs.inspection.measures import Measure, cells, sizes, total
from diffxfer.diffs.inspection.places import Place as PlaceInModel
from diffxfer.diffs.inspection.places import places
from diffxfer.diffs.matching.names import pattern
from diffxfer.diffs.soundness.check import inspect_files
from diffxfer.errors import QuantizedError, listed
from diffxfer.pages.report_folder import report_folder, write_report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.location import Place
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.checkpoints.weights import Weights
    from diffxfer.diffs.artifact.manifest import Manifest

_COMPANIONS = "companions"


def inspect_checkpoint(path: Path | str, *, output: Path | str | None = None) -> Inspection:
    """Describe a checkpoint, a diff vector or an adapter without reading its weights.

    Args:
        path: a model of any origin, a diff vector or a LoRA adapter: a folder, or one on the Hub,
            ``"org/name"`` or ``"org/name@revision"``.
        output: a folder for `report.html`, a page with heat maps, and `report.json`, the same data.

    Returns:
        Its description.

    Raises:
        DiffxferError: if it has no weights in safetensors files, or a file in it is broken, or
            `output` has other files.

    Example:
        >>> inspect_checkpoint("sft-diff").norms.ratio  # doctest: +SKIP
    """
    place = find(path, "a checkpoint or a diff vector")
    folder = None if output is None else report_folder(output, [place.folder])
    found = (_inspect_adapter if is_adapter(place) else _inspect_weights)(path, place)
    if folder is not None:
        write_report(folder, inspection_page(found), found.as_json())
    return found


def _inspect_weights(path: Path | str, place: Place) -> Inspection:
    folder = place.folder
    manifest = read_manifest(folder)
    is_diff = manifest is not None and manifest.kind == "diff"
    config = optional_object(folder / _COMPANIONS if is_diff else folder, "config.json")
    # A diff vector is not quantised, even if finetuned, whose config it has, is.
    of_weights = {} if is_diff else config
    weights = diff_weights(decoded(open_weights(place), of_weights), manifest)
    quantized = _quantized(folder, of_weights, weights)
    beside = list_companions(folder)
    specs = weights.tensors
    measured = dict(_measured(manifest, specs)) if manifest is not None and is_diff else {}
    where = places(specs)
    return Inspection(
        path=Path(path),
        kind="checkpoint" if manifest is None else manifest.kind,
        architecture=_architecture(config),
        quantized=quantized,
        tensors=len(specs),
        parameters=sum(spec.elements for spec in specs.values()),
        dtypes=_dtypes(specs),
        groups=_groups(specs),
        shards={shard.path.name: shard.size for shard in weights.shards},
        companions=_diff_companions(folder) if is_diff else beside.names,
        other_files=() if is_diff else beside.left_out,
        sources={} if manifest is None else manifest.sources,
        options={} if manifest is None else dict(manifest.command),
        written_by=None if manifest is None else manifest.diffxfer_version,
        integers=() if manifest is None else tuple(manifest.kept),
        left_out=() if manifest is None else tuple(manifest.left_out),
        added_tensors=() if manifest is None else tuple(manifest.added_tensors),
        inexact=_inexact(manifest) if manifest is not None and is_diff else None,
        lossy=() if manifest is None else recorded(manifest),
        norms=total(measured.values()) if is_diff else None,
        cells=cells((where[name], measure) for name, measure in measured.items()),
        warnings=tuple(_warnings(manifest, weights)) if manifest is not None else (),
        findings=inspect_files(
            folder / _COMPANIONS if is_diff else folder,
            specs,
            whole=not is_diff and quantized is None,
        ),
        encodings=weights.formats,
        sizes=sizes((where[name], spec.elements) for name, spec in specs.items()),
        bits_per_weight=_bits_per_weight(specs),
    )


def _inspect_adapter(path: Path | str, place: Place) -> Inspection:
    adapter = read_adapter(place)
    specs, beside = adapter.tensors, list_companions(place.folder)
    return Inspection(
        path=Path(path),
        kind="adapter",
        architecture=None,
        quantized=None,
        tensors=len(specs),
        parameters=sum(spec.elements for spec in specs.values()),
        dtypes=_dtypes(specs),
        groups=_groups(specs),
        shards={adapter.shard.path.name: adapter.shard.size},
        companions=beside.names,
        other_files=beside.left_out,
        sources={},
        options={},
        written_by=None,
        integers=(),
        left_out=(),
        added_tensors=(),
        inexact=None,
        norms=None,
        cells=(),
        warnings=(),
        findings=(),
        adapter=adapter_facts(adapter),
        sizes=sizes(_factor_sizes(adapter)),
    )


def _factor_sizes(adapter: Adapter) -> Iterator[tuple[PlaceInModel, int]]:
    """The number of elements of each module's factors, at the module's place in the model."""
    counts = {
        f"{module}.weight": sum(
            spec.elements for each in found for spec in (each.a, each.b) if spec is not None
        )
        for module, found in adapter.factors.items()
    }
    where = places(counts)
    return ((where[name], count) for name, count in counts.items())


def _diff_companions(path: Path) -> tuple[str, ...]:
    folder = path / _COMPANIONS
    return list_companions(folder).names if folder.is_dir() else ()


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else config.get("model_type")
    return first if isinstance(first, str) else None


def _quantized(path: Path, config: Mapping[str, Any], weights: Weights) -> str | None:
    try:
        refuse_quantized(path, config, weights)
    except QuantizedError as exc:
        return exc.problem
    return None


def _dtypes(specs: Mapping[str, StoredTensor]) -> dict[str, int]:
    found = Counter[str]()
    for spec in specs.values():
        found[spec.dtype] += spec.elements
    return dict(found.most_common())


def _groups(specs: Mapping[str, StoredTensor]) -> tuple[TensorGroup, ...]:
    groups: dict[tuple[str, str, tuple[int, ...], str], list[StoredTensor]] = {}
    for name, spec in specs.items():
        key = pattern(name), spec.dtype, spec.shape, spec.encoding
        groups.setdefault(key, []).append(spec)
    return tuple(
        TensorGroup(
            named,
            dtype,
            shape,
            len(each),
            sum(spec.elements for spec in each),
            encoding,
            _bits(each),
        )
        for (named, dtype, shape, encoding), each in groups.items()
    )


def _bits(specs: Iterable[StoredTensor]) -> float:
    """The bits on disk for each element."""
    sizes = [(spec.stored_bytes, spec.elements) for spec in specs]
    elements = sum(count for _, count in sizes)
    return 8 * sum(stored for stored, _ in sizes) / elements if elements else 0.0


def _bits_per_weight(specs: Mapping[str, StoredTensor]) -> float | None:
    encoded = [spec for spec in specs.values() if spec.encoding]
    return _bits(encoded) if encoded else None


def _measured(
    manifest: Manifest, specs: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Measure]]:
    for name, entry in manifest.tensors.items():
        if name in specs and entry.delta_norm is not None and entry.base_norm is not None:
            count = specs[name].elements
            yield name, Measure(1, count, entry.delta_norm, entry.base_norm, entry.unchanged)


def norms_by_kind(folder: Path) -> dict[str, Measure]:
    """The norms in a diff vector's manifest, by the pattern of the tensors' names.

    Args:
        folder: the diff vector.

    Returns:
        One entry per pattern, in the order of the tensors; the last one is named ``"all"``.
    """
    kinds: dict[str, list[Measure]] = {}
    manifest = require_diff(folder)
    weights = diff_weights(open_weights(folder), manifest)
    for name, measure in _measured(manifest, weights.tensors):
        kinds.setdefault(pattern(name), []).append(measure)
    found = {kind: total(parts) for kind, parts in kinds.items()}
    return {**found, "all": total(found.values())}


def _inexact(manifest: Manifest) -> int | None:
    if manifest.lossy is not None:
        return None
    return sum(entry.inexact or 0 for entry in manifest.tensors.values())


def _warnings(manifest: Manifest, weights: Weights) -> Iterator[str]:
    """Warn if the shards are not those that the manifest was written for."""
    for shard in weights.shards:
        known = manifest.shards.get(shard.path.name)
        if known is None or (known.size, known.header_xxh3) != (shard.size, shard.header_hash):
            yield f"{shard.path.name} is not the shard that the manifest names"
    unknown = [
        name
        for name, entry in manifest.tensors.items()
        if None in (entry.delta_norm, entry.base_norm) and name not in manifest.added_tensors
    ]
    if unknown and manifest.kind == "diff":
        yield f"left out of the norms because they are not finite: {listed(unknown)}"
    # A graft's manifest names what was written: codes and scales too.
    stored = weights.on_disk if manifest.kind == "graft" else weights.tensors
    odd = sorted(manifest.tensors.keys() ^ stored.keys())
    if odd:
        yield f"the manifest and the shards do not name the same tensors, such as {odd[0]!r}"
