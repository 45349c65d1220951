"""The cells of a model as a grid: rows of layers, columns of kinds of modules.

Both the table in a terminal and the heat map on a page show this grid.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffxfer.diffs.inspection.measures import Cell, Measure

OTHER = "other"
"""The column or row that the smallest kinds share where there is no space for all."""

_OUTSIDE = 12
"""The most rows for modules outside the layers; the smallest modules share one row."""
_FIRST = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
_LAST = ("experts", "norms")


@dataclass(frozen=True, slots=True)
class GridRow:
    """One row: some layers, or a kind of module outside the layers.

    Attributes:
        stack: the stack of its layers; empty outside the layers.
        label: its label.
        cells: its cells.
    """

    stack: str
    label: str
    cells: tuple[Cell, ...]

    def parts(self, columns: Mapping[str, str]) -> dict[str, list[Measure]]:
        """The measures in each column; modules outside the layers are in the column ``""``.

        Args:
            columns: the column of each kind of module.
        """
        parts: dict[str, list[Measure]] = {}
        for cell in self.cells:
            column = columns[cell.place.kind] if cell.place.stack else ""
            parts.setdefault(column, []).append(cell.measure)
        return parts


def grid_rows(cells: Sequence[Cell], most: int) -> Iterator[GridRow]:
    """The layers, then the modules outside the layers.

    Args:
        cells: every place of a model, in order.
        most: the most rows of layers; if there are more layers, several share a row.
    """
    layers: dict[str, dict[int, list[Cell]]] = {}
    for cell in cells:
        if cell.place.stack:
            layers.setdefault(cell.place.stack, {}).setdefault(cell.place.layer, []).append(cell)

    def fits(size: int) -> bool:
        rows = sum(-(-len(own) // size) for own in layers.values())
        return rows <= max(most, len(layers))

    sizes = range(1, max(map(len, layers.values()), default=1))
    size = 1 + bisect_left(sizes, True, key=fits)
    for stack, own in layers.items():
        numbers = sorted(own)
        for start in range(0, len(numbers), size):
            group = numbers[start : start + size]
            label = str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"
            yield GridRow(stack, label, tuple(cell for layer in group for cell in own[layer]))
    yield from _outside([cell for cell in cells if not cell.place.stack])


def kinds_in_layers(cells: Sequence[Cell]) -> dict[str, int]:
    """The kinds of modules in layers with their parameters, attention first and norms last.

    Args:
        cells: every place of a model.
    """
    parameters = Counter[str]()
    for cell in cells:
        if cell.place.stack:
            parameters[cell.place.kind] += cell.measure.parameters
    return {kind: parameters[kind] for kind in sorted(parameters, key=_order)}


def _order(kind: str) -> tuple[int, str]:
    known = [*_FIRST, None, *_LAST]
    return known.index(kind if kind in known else None), kind


def _outside(cells: Sequence[Cell]) -> Iterator[GridRow]:
    smallest = sorted(cells, key=lambda cell: cell.measure.parameters)
    shared = smallest[: 1 - _OUTSIDE] if len(cells) > _OUTSIDE else []
    kinds = {cell.place.kind for cell in shared}
    for cell in cells:
        if cell.place.kind not in kinds:
            yield GridRow("", printable(cell.place.kind), (cell,))
    if shared:
        yield GridRow("", OTHER, tuple(shared))
