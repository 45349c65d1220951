"""A heat table of how much a model differs, by layer and kind of module.

A cell is a percentage and a bar of that height, so that it can be read without colour.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from diffxfer.cli.table import folded, make_table
from diffxfer.diffs.inspection.grid import OTHER, GridRow, grid_rows, kinds_in_layers
from diffxfer.diffs.inspection.measures import Cell, Measure, percent, total
from diffxfer.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from rich.text import Text

_Sides: TypeAlias = list[tuple[str, int]]

_ROWS = 24
"""The most rows of layers: with the lines around them, they fit on a screen of 40 lines."""
_CELL, _WIDEST_HEAD, _WIDEST_LABEL = 5, 7, 18
_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = (230, 229, 222, 216, 215, 209, 203, 197)
"""Terminal colours (of 256) from pale yellow to red; black text is readable on all of them."""


def heat_table(cells: Sequence[Cell], width: int) -> Table:
    """Cells as a table that fits the width of a terminal.

    Args:
        cells: every place of a model, in order.
        width: columns of the terminal.
    """
    from rich.text import Text

    rows = list(grid_rows(cells, _ROWS))
    stacks = {row.stack: printable(row.stack) for row in rows if row.stack}
    titles = stacks if len(stacks) > 1 else {}
    longest = max(map(len, ["all", *titles.values(), *(row.label for row in rows)]))
    label = min(max(_WIDEST_LABEL, width // 6), longest)
    sides = _sides(cells)
    room = width - label - sum(size + 1 for _, size in sides)
    kinds = _kinds(cells, room)
    most = _most(rows, kinds)
    table = make_table(padding=(0, 1, 0, 0))
    table.add_column("", width=label, overflow="fold")
    for kind in dict.fromkeys(kinds.values()):
        table.add_column(folded(kind), width=_width(kind), justify="right")
    for side, size in sides:
        table.add_column(side, width=size, justify="right")
    stack = ""
    for row in rows:
        if row.stack != stack and row.stack in titles:
            table.add_row(Text(titles[row.stack], "dim", overflow="ellipsis", no_wrap=True))
        stack = row.stack
        table.add_row(*_line(row, kinds, most, sides))
    table.add_row(*_line(GridRow("layers", "all", tuple(cells)), kinds, most, sides, whole=True))
    return table


def _sides(cells: Sequence[Cell]) -> _Sides:
    """The columns at the right: totals over all kinds of a row."""
    sides = [("all", _CELL)]
    if all(cell.measure.unchanged is not None for cell in cells):
        sides.append(("same", _CELL))
    if any(cell.measure.other is not None for cell in cells):
        sides.append(("cosine", 8))
    return sides


def _width(kind: str) -> int:
    return max(_CELL, min(len(kind), _WIDEST_HEAD))


def _kinds(cells: Sequence[Cell], room: int) -> dict[str, str]:
    """The kinds of modules in layers, each with its column; the smallest may have to share one."""
    parameters = kinds_in_layers(cells)
    shared: set[str] = set()
    left = room - sum(_width(kind) + 1 for kind in parameters)
    for kind in sorted(parameters, key=lambda kind: (parameters[kind], kind)):
        if left >= 0:
            break
        left += _width(kind) + 1 - (0 if shared else _width(OTHER) + 1)
        shared.add(kind)
    return {kind: kind for kind in parameters if kind not in shared} | dict.fromkeys(shared, OTHER)


def _most(rows: Sequence[GridRow], kinds: dict[str, str]) -> float:
    """The largest ratio of a table, which gets the highest bar."""
    ratios = [total(part).ratio for row in rows for part in row.parts(kinds).values()]
    return max((ratio for ratio in ratios if ratio < math.inf), default=0.0)


def _line(
    row: GridRow, kinds: dict[str, str], most: float, sides: _Sides, *, whole: bool = False
) -> list[Text]:
    from rich.text import Text

    parts = row.parts(kinds)
    line = [Text(row.label, "bold" if whole else "", overflow="fold")]
    for column in dict.fromkeys(kinds.values()):
        line.append(_heat(total(parts[column]), most) if column in parts else Text(""))
    every = total(cell.measure for cell in row.cells)
    line.append(_heat(every, most))
    for head, _ in sides[1:]:
        if head == "same":
            share = every.unchanged_share
            line.append(Text("" if share is None else percent(share)))
        else:
            cosine = every.cosine
            line.append(Text("" if cosine is None else f"{cosine:.5f}"))
    return line


def _heat(measure: Measure, most: float) -> Text:
    from rich.text import Text

    ratio = measure.ratio
    if ratio == 0:
        return Text("0 ")
    # The bar's height shows the value without colours.
    level = min(len(_BARS), math.ceil(len(_BARS) * min(1.0, ratio / most))) - 1 if most else -1
    return Text(percent(ratio) + _BARS[level], f"black on color({_COLOURS[level]})")
