"""Printing the description of a checkpoint or a diff vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.console import print_warnings
from diffxfer.cli.heat import heat_table, percent
from diffxfer.cli.table import add_columns, folded, make_table, print_facts, print_head, stdout
from diffxfer.errors import listed, printable

if TYPE_CHECKING:
    from rich.table import Table

    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.diffs.inspection.adapter import AdapterFacts
    from diffxfer.diffs.inspection.describe import Inspection, TensorGroup
    from diffxfer.diffs.inspection.measures import Measure

_KINDS = {
    "checkpoint": "a checkpoint",
    "adapter": "a LoRA adapter",
    "diff": "a diff vector: finetuned − base",
    "graft": "a graft: target + α·Δ",
    "tuned": "a model that diffxfer tune trained",
}
_HEAT = "‖Δ‖/‖base‖ in %, by layer and kind of module"
_SAME = "same: % of elements that fine-tuning did not change"
_GROUPS = 40
"""The most groups of tensors to print; `--json` has all of them."""


def print_inspection(found: Inspection) -> None:
    """Print the description of a folder of weights.

    Args:
        found: the description.
    """
    from rich.text import Text

    out = stdout()
    print_head(f"{found.path}: {_KINDS.get(found.kind, found.kind)}", out)
    print_facts(_facts(found), out)
    out.print()
    if found.cells:
        out.print(Text(_HEAT, "bold"))
        out.print(heat_table(found.cells, out.width))
        if found.norms is not None and found.norms.unchanged is not None:
            out.print(Text(_SAME, "dim"))
    elif found.kind != "diff":
        out.print(_groups(found.groups))
        if len(found.groups) > _GROUPS:
            more = len(found.groups) - _GROUPS
            out.print(Text(f"and {more} more groups; --json lists them all", "dim"))
    if found.findings:
        out.print()
        out.print(Text("contradictions between its files", "bold"))
    for finding in found.findings:
        line = f"{finding.severity}: {finding}"
        out.print(Text(printable(line), "red" if finding.severity == "error" else ""))
    print_warnings(found.warnings)


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


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.adapter is not None:
        yield from _adapter_facts(found.adapter)
    if found.architecture:
        yield "architecture", found.architecture
    if found.encodings:
        yield "decoded from", ", ".join(found.encodings)
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
    return f"{named} ({size}{'; from ' + inner if inner else ''})"


def _options(found: Inspection) -> str:
    """The command's verb and its options that are not empty."""
    said = {name: value for name, value in found.options.items() if value not in ([], {}, "false")}
    verb = str(said.pop("verb", ""))
    return " ".join((verb, *(f"{name}={_value(value)}" for name, value in said.items()))).strip()


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={number}" for key, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _groups(groups: Sequence[TensorGroup]) -> Table:
    table = make_table()
    add_columns(table, "tensors", "dtype")
    add_columns(table, "shape", "count", "parameters", numbers=True)
    for group in groups[:_GROUPS]:
        shape = " × ".join(map(str, group.shape)) or "scalar"
        cells = (group.pattern, group.dtype, shape, f"{group.tensors:,}", f"{group.parameters:,}")
        table.add_row(*map(folded, cells))
    return table
