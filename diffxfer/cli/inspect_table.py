"""Printing the description of a checkpoint or a diff vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffxfer.cli.console import print_warnings
from diffxfer.cli.heat import heat_table
from diffxfer.cli.table import add_columns, folded, make_table, print_facts, print_head, stdout
from diffxfer.diffs.inspection.facts import inspection_facts, kind_in_words
from diffxfer.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from diffxfer.diffs.inspection.description import Inspection, TensorGroup

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
    print_head(f"{found.path}: {kind_in_words(found.kind)}", out)
    print_facts(inspection_facts(found), out)
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


def _groups(groups: Sequence[TensorGroup]) -> Table:
    table = make_table()
    encoded = any(group.encoding for group in groups)
    add_columns(table, "tensors", "stored as" if encoded else "dtype")
    add_columns(table, "shape", "count", "parameters", numbers=True)
    for group in groups[:_GROUPS]:
        shape = " × ".join(map(str, group.shape)) or "scalar"
        stored = f"{group.encoding}; {group.bits:.2f} bits" if group.encoding else group.dtype
        cells = (group.pattern, stored, shape, f"{group.tensors:,}", f"{group.parameters:,}")
        table.add_row(*map(folded, cells))
    return table
