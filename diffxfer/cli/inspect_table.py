"""Printing the description of a checkpoint or a diff vector."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from diffxfer.cli.console import PIPE_WIDTH, print_warnings
from diffxfer.cli.heat import heat_table, percent
from diffxfer.cli.hub import gigabytes
from diffxfer.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.diffs.inspection.describe import Inspection, TensorGroup
    from diffxfer.diffs.inspection.measures import Measure

_KINDS = {
    "checkpoint": "a checkpoint",
    "diff": "a diff vector: finetuned − base",
    "graft": "a graft: target + α·Δ",
    "adapter": "a LoRA adapter",
    "tuned": "a checkpoint that was trained further",
}
_HEAT = "‖Δ‖/‖base‖ in %, by layer and kind of module"
_SAME = "same: % of elements that fine-tuning left as they were"
_GROUPS = 40
"""The most groups of tensors to print; `--json` has all of them."""


def stdout() -> Console:
    """The console for tables; output to a pipe or file is not folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_inspection(found: Inspection, *, out: Console | None = None) -> None:
    """Print the description of a folder of weights.

    Args:
        found: the description.
        out: the console; stdout by default.
    """
    from rich.text import Text

    out = out or stdout()
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
            out.print(Text(f"and {more} more such groups; --json lists them all", "dim"))
    if found.findings:
        out.print()
        out.print(Text("what its files say against each other", "bold"))
    for finding in found.findings:
        line = f"{finding.severity}: {finding}"
        out.print(Text(printable(line), "red" if finding.severity == "error" else ""))
    print_warnings(found.warnings)


def print_head(text: str, out: Console) -> None:
    """Print a heading.

    Args:
        text: the heading.
        out: the console.
    """
    from rich.text import Text

    out.print(Text(printable(text), "bold", overflow="fold"))


def print_facts(facts: Iterator[tuple[str, str]], out: Console) -> None:
    """Print names and values in two columns.

    Args:
        facts: name and value, one line each; long lines are folded.
        out: the console.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(Text(printable(name), "dim"), Text(printable(text), overflow="fold"))
    out.print(table)


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.architecture:
        yield "architecture", found.architecture
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
        yield "other files", _some(found.other_files)
    if found.integers:
        yield "integers", f"{_some(found.integers)} (no part of a diff vector)"
    if found.added_tensors:
        yield "added", f"{_some(found.added_tensors)} (stored whole, since base has none)"
    if found.left_out:
        yield "left out", _some(found.left_out)
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


def _some(names: Sequence[str]) -> str:
    from diffxfer.diffs.jobs.report import listed

    return listed(names)


def _groups(groups: Sequence[TensorGroup]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensors")
    table.add_column("dtype")
    for head in ("shape", "count", "parameters"):
        table.add_column(head, justify="right")
    for group in groups[:_GROUPS]:
        shape = " × ".join(map(str, group.shape)) or "scalar"
        cells = (group.pattern, group.dtype, shape, f"{group.tensors:,}", f"{group.parameters:,}")
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    return table
