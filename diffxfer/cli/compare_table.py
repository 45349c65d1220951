"""Printing how two checkpoints differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from diffxfer.cli.console import print_warnings
from diffxfer.cli.heat import heat_table, percent
from diffxfer.cli.table import add_columns, folded, make_table, print_facts, print_head, stdout
from diffxfer.errors import listed

if TYPE_CHECKING:
    from rich.table import Table

    from diffxfer.diffs.inspection.compare import Comparison, TensorContrast

_MOST_CHANGED = 8
_SIGNS = "same: % of elements that are equal, bit for bit, or by value if the dtypes differ"


def print_comparison(found: Comparison) -> None:
    """Print how two checkpoints differ.

    Args:
        found: the comparison.
    """
    from rich.text import Text

    out = stdout()
    print_head(f"A: {found.path}", out)
    print_head(f"B: {found.other}", out)
    print_facts(_facts(found), out)
    if found.cells:
        out.print(Text("\n‖B−A‖/‖A‖ in %, by layer and kind of module", "bold"))
        out.print(heat_table(found.cells, out.width))
        out.print(Text(_SIGNS, "dim"))
    changed = [t for t in found.tensors if t.measure is not None and t.measure.delta]
    if changed:
        out.print(Text("\nmost changed", "bold"))
        changed.sort(key=_ratio, reverse=True)
        out.print(_most_changed(changed[:_MOST_CHANGED]))
    print_warnings(found.warnings)


def _facts(found: Comparison) -> Iterator[tuple[str, str]]:
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
    for each in found.unlike[:_MOST_CHANGED]:
        yield "not compared", f"{each.name}: {each.found} in A, {each.other} in B"
    if len(found.unlike) > _MOST_CHANGED:
        yield "", f"and {len(found.unlike) - _MOST_CHANGED} more tensors"


def _bytes(found: Comparison) -> str:
    """Integer and quantised tensors: how many are equal, and which differ."""
    others = [each.name for each in found.bytes_compared if each.unchanged != each.size]
    every = len(found.bytes_compared)
    same = f"the same: {every - len(others):,} of {every:,} tensors of other dtypes"
    return f"{same}; not: {listed(others)}" if others else same


def _ratio(tensor: TensorContrast) -> float:
    return 0.0 if tensor.measure is None else tensor.measure.ratio


def _most_changed(tensors: Sequence[TensorContrast]) -> Table:
    table = make_table()
    add_columns(table, "tensor")
    add_columns(table, "%", "‖B−A‖", "cosine", "same", numbers=True, no_wrap=True)
    for tensor in tensors:
        measure = tensor.measure
        assert measure is not None
        cosine = "" if measure.cosine is None else f"{measure.cosine:.5f}"
        share = percent(measure.unchanged_share or 0)
        cells = (percent(measure.ratio), f"{measure.delta:.4g}", cosine, share)
        table.add_row(folded(tensor.name), *cells)
    return table
