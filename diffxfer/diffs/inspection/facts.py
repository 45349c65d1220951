"""The facts of a description and of a comparison in words, for a terminal and for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.diffs.artifact.distances import in_words
from diffxfer.diffs.inspection.measures import percent
from diffxfer.errors import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.diffs.inspection.adapter import AdapterFacts
    from diffxfer.diffs.inspection.comparison import Comparison
    from diffxfer.diffs.inspection.description import Inspection
    from diffxfer.diffs.inspection.measures import Measure

_KINDS = {
    "checkpoint": "a checkpoint",
    "adapter": "a LoRA adapter",
    "diff": "a diff vector: finetuned − base",
    "graft": "a graft: target + α·Δ",
    "tuned": "a model that diffxfer tune trained",
}
_MOST_UNLIKE = 8


def kind_in_words(kind: str) -> str:
    """What a folder of weights is.

    Args:
        kind: see `Inspection.kind`.
    """
    return _KINDS.get(kind, kind)


def _adapter_facts(found: AdapterFacts) -> Iterator[tuple[str, str]]:
    kind = "DoRA" if found.dora else "LoRA"
    ranks = ", ".join(f"{rank:,}" for rank in found.ranks)
    scalings = ", ".join(f"{scaling:g}" for scaling in found.scalings)
    if found.base:
        yield "made for", found.base
    yield "factors", f"{kind} of {found.modules:,} modules: {', '.join(found.targets)}"
    yield "rank", ranks
    yield "alpha", f"{found.alpha:g}; B·A is scaled by {scalings}"
    if found.whole:
        yield "stored whole", listed(found.whole)
    if found.token_rows:
        yield "token rows", f"{found.token_rows:,}"
    if found.resized is None and not found.needs_base:
        rows = f"{found.embedding_rows:,} rows"
        yield "Δ", f"is complete if its base has {rows} of tokens, else it depends on its base"
    elif found.needs_base:
        yield "Δ", "depends on its base"
    else:
        yield "Δ", "is complete: apply needs no base"


def inspection_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """The facts of a folder of weights in words: pairs of name and value.

    Args:
        found: its description.
    """
    if found.adapter is not None:
        yield from _adapter_facts(found.adapter)
    if found.architecture:
        yield "architecture", found.architecture
    if found.encodings:
        bits = found.bits_per_weight
        size = "" if bits is None else f"; {bits:.2f} bits a weight with scales"
        yield "decoded from", ", ".join(found.encodings) + size
    if found.quantized:
        yield "quantised", found.quantized
    yield "tensors", f"{found.tensors:,}, {found.parameters:,} parameters ({_dtypes(found.dtypes)})"
    yield "shards", f"{len(found.shards):,}, {gigabytes(sum(found.shards.values()))}"
    for role, source in found.sources.items():
        yield role, _source(source)
    if found.options:
        yield "made by", f"diffxfer {found.written_by} {_options(found)}"
    yield "companions", ", ".join(found.companions) or "none"
    if found.other_files:
        yield "other files", listed(found.other_files)
    if found.integers:
        yield "integers", f"{listed(found.integers)} (not part of a diff vector)"
    if found.added_tensors:
        yield "added", f"{listed(found.added_tensors)} (stored whole, since base has none)"
    if found.left_out:
        yield "left out", listed(found.left_out)
    if found.norms is not None:
        yield from _norms(found, found.norms)


def _norms(found: Inspection, norms: Measure) -> Iterator[tuple[str, str]]:
    ratio = f"{percent(norms.ratio)} % of ‖base‖ = {norms.base:.4g}"
    yield "‖Δ‖", f"{norms.delta:.4g}, {ratio}"
    share = norms.unchanged_share
    if share is not None:
        yield "unchanged", f"{norms.unchanged:,} elements, {percent(share)} %"
    if found.lossy:
        yield "lossy", in_words(found.lossy)
    if found.inexact:
        yield "inexact", f"{found.inexact:,} elements that base + Δ does not give back bit for bit"


def _dtypes(dtypes: dict[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{dtype} {count:,}" for dtype, count in dtypes.items())


def _source(source: SourceEntry) -> str:
    named = source.name if source.revision is None else f"{source.name}@{source.revision}"
    size = gigabytes(sum(shard.size for shard in source.shards.values()))
    inner = ", ".join(f"{role} {made.name}" for role, made in source.made_from.items())
    told = [size]
    told += [f"decoded from {', '.join(source.decoded_from)}"] if source.decoded_from else []
    told += [f"from {inner}"] if inner else []
    return f"{named} ({'; '.join(told)})"


def _options(found: Inspection) -> str:
    """The command's verb and its options that are not empty."""
    said = {name: value for name, value in found.options.items() if value not in ([], {}, "false")}
    verb = str(said.pop("verb", ""))
    return " ".join((verb, *(f"{name}={_value(value)}" for name, value in said.items()))).strip()


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={number}" for key, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def comparison_facts(found: Comparison) -> Iterator[tuple[str, str]]:
    """The facts of a comparison in words: pairs of name and value.

    Args:
        found: the comparison.
    """
    norms = found.norms
    yield "compared", f"{len(found.tensors):,} tensors, {norms.parameters:,} parameters"
    if norms.tensors:
        yield "‖A‖, ‖B‖", f"{norms.base:.4g}, {norms.other or 0.0:.4g}"
        yield "‖B−A‖", f"{norms.delta:.4g}, {percent(norms.ratio)} % of ‖A‖"
        if norms.cosine is not None:
            yield "cosine", f"{norms.cosine:.9f}"
        yield "unchanged", f"{norms.unchanged:,} elements, {percent(norms.unchanged_share or 0)} %"
    if found.nonfinite:
        yield "not finite", f"{listed(found.nonfinite)} (NaN or infinity, left out of the norms)"
    if found.bytes_compared:
        yield "as bytes", _bytes(found)
    for name, names in (("only in A", found.only_in_path), ("only in B", found.only_in_other)):
        if names:
            yield name, f"{len(names):,}: {listed(names)}"
    for each in found.unlike[:_MOST_UNLIKE]:
        yield "not compared", f"{each.name}: {each.found} in A, {each.other} in B"
    if len(found.unlike) > _MOST_UNLIKE:
        yield "", f"and {len(found.unlike) - _MOST_UNLIKE} more tensors"


def _bytes(found: Comparison) -> str:
    """Integer and quantised tensors: how many are equal, and which differ."""
    others = [each.name for each in found.bytes_compared if each.unchanged != each.size]
    every = len(found.bytes_compared)
    same = f"the same: {every - len(others):,} of {every:,} tensors of other dtypes"
    return f"{same}; not: {listed(others)}" if others else same
