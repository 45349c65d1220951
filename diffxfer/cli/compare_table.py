"""Printing how two checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffxfer.cli.console import print_warnings
from diffxfer.cli.heat import heat_table
from diffxfer.cli.table import add_columns, folded, make_table, print_facts, print_head, stdout
from diffxfer.diffs.inspection.facts import comparison_facts
from diffxfer.diffs.inspection.measures import percent

if TYPE_CHECKING:
    from rich.table import Table

    from diffxfer.diffs.inspection.comparison import Comparison, TensorContrast

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
    print_facts(comparison_facts(found), out)
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
