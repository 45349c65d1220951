"""The pages of a description and of a comparison.

A page is meant to be shared, so it has no local paths.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.diffs.inspection.facts import comparison_facts, inspection_facts, kind_in_words
from diffxfer.diffs.inspection.grid import GridRow, grid_rows, kinds_in_layers
from diffxfer.diffs.inspection.measures import Cell, Measure, percent, total
from diffxfer.diffs.inspection.standouts import FACTOR, spreads
from diffxfer.pages.charts import heat_map
from diffxfer.pages.local_paths import without_folders
from diffxfer.pages.page import Cell as TableCell
from diffxfer.pages.page import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from diffxfer.diffs.inspection.comparison import Comparison
    from diffxfer.diffs.inspection.description import Inspection
    from diffxfer.diffs.inspection.measures import Size
    from diffxfer.diffs.inspection.standouts import Spread, StandOut

_ROWS = 128
_MOST_CHANGED = 12
_GROUPS = 60
_ALL = "all"


def inspection_page(found: Inspection) -> Page:
    """Make the page of a checkpoint, a diff vector, a graft or an adapter.

    Args:
        found: its description.
    """
    name = _name(found.path)
    page = Page(f"{name}: {kind_in_words(found.kind)}")
    if found.cells and found.norms is not None:
        page.verdict([_size_of_change(found.norms), *_standing_out(found.cells, "changed")])
    else:
        page.verdict(list(_size_of_model(found)))
    page.facts((key, _shared(text, found.path)) for key, text in inspection_facts(found))
    if found.cells:
        _add_ratios(page, found.cells, "‖Δ‖ / ‖base‖", _OF_DIFF)
        _add_unchanged(page, found.cells, "fine-tuning did not change")
    elif found.sizes:
        _add_sizes(page, found)
    if not found.cells and found.kind != "diff":
        _add_groups(page, found)
    _add_list(page, "Contradictions between its files", map(str, found.findings), found.path)
    _add_list(page, "Warnings", found.warnings, found.path)
    return page


def comparison_page(found: Comparison) -> Page:
    """Make the page of a comparison.

    Args:
        found: the comparison.
    """
    page = Page(f"How {_name(found.other)} (B) differs from {_name(found.path)} (A)")
    page.verdict([_size_of_difference(found), *_standing_out(found.cells, "differs")])
    page.facts((key, _shared(text, found.path)) for key, text in comparison_facts(found))
    if found.cells:
        _add_ratios(page, found.cells, "‖B − A‖ / ‖A‖", _OF_COMPARISON)
        _add_unchanged(page, found.cells, "are equal in A and B")
    _add_most_changed(page, found)
    _add_list(page, "Warnings", found.warnings, found.path)
    return page


_OF_DIFF = (
    "the colour of a cell is the size of what fine-tuning changed in that part of the model,"
    " relative to the size of the weights that were there before. 0 % is unchanged; at 100 %, the"
    " change is as large as the weights. A blank cell is a part that the layer does not have."
)
_OF_COMPARISON = (
    "the colour of a cell is the size of the difference in that part of the model, relative to"
    " A's weights there. 0 % is equal; two unrelated models of the same size are near 141 %. A"
    " blank cell is a part that the layer does not have."
)
_OF_SIZES = (
    "the colour of a cell is how many parameters that part of the model has. Layers whose rows have"
    " the same colours are built alike. A blank cell is a part that the layer does not have."
)
_OF_UNCHANGED = (
    "a model that was trained with few steps, a small learning rate or frozen layers keeps many of"
    " its 16-bit numbers exactly; one that was trained throughout keeps few."
)


def _name(path: Path) -> str:
    """The name of a model: its id on the Hub, or its folder's name."""
    return Path(os.path.realpath(path)).name if path.exists() else str(path)


def _share(ratio: float) -> str:
    return f"{percent(ratio)} %"


def _shared(text: str, folder: Path) -> str:
    return without_folders(text, folder.parent, None)


def _size_of_change(norms: Measure) -> str:
    share = norms.unchanged_share
    kept = "" if share is None else f" It left {_share(share)} of the numbers as they were."
    return f"Fine-tuning changed the weights by {_share(norms.ratio)} of their size.{kept}"


def _size_of_difference(found: Comparison) -> str:
    norms = found.norms
    if not norms.tensors:
        return "The two have no float tensors that can be compared."
    if not norms.delta:
        return "All values that were compared are equal."
    cosine = "" if norms.cosine is None else f" (cosine {norms.cosine:.6f})"
    alike = percent(norms.unchanged_share or 0)
    return (
        f"B's weights differ from A's by {_share(norms.ratio)} of their size{cosine};"
        f" {alike} % of the numbers are equal."
    )


def _size_of_model(found: Inspection) -> Iterator[str]:
    what = "factors" if found.adapter is not None else "parameters"
    yield f"{found.parameters:,} {what} in {found.tensors:,} tensors."
    layers: dict[str, dict[int, int]] = {}
    for size in found.sizes:
        if size.place.stack:
            own = layers.setdefault(size.place.stack, {})
            own[size.place.layer] = own.get(size.place.layer, 0) + size.parameters
    for stack, own in layers.items():
        where = "" if len(layers) == 1 else f" of {stack}"
        yield _layers_alike(own, where)


def _layers_alike(own: dict[int, int], where: str) -> str:
    """Which layers have another number of parameters than most."""
    counts = list(own.values())
    usual = max(dict.fromkeys(counts), key=counts.count)
    odd = [layer for layer, count in own.items() if count != usual]
    if not odd:
        return f"All {len(own)} layers{where} have {usual:,} parameters each."
    named = ", ".join(f"{layer} ({own[layer]:,})" for layer in odd[:6])
    more = f" and {len(odd) - 6} more" if len(odd) > 6 else ""
    return (
        f"{len(own) - len(odd)} of {len(own)} layers{where} have {usual:,} parameters each; other"
        f" numbers: layer {named}{more}."
    )


def _standing_out(cells: Sequence[Cell], verb: str) -> Iterator[str]:
    """Sentences about the layers and kinds of modules that stand out."""
    for spread in spreads(cells):
        yield _sentence(spread, verb)


def _sentence(spread: Spread, verb: str) -> str:
    middle = f"the median is {_share(spread.middle)}"
    if not spread.outliers:
        ends = " to ".join(f"{_share(e.ratio)} ({e.name})" for e in (spread.least, spread.most))
        return f"None of the {spread.group} stands out: {ends}; {middle}."
    named = ", ".join(map(_outlier, spread.outliers[:4]))
    more = f" and {len(spread.outliers) - 4} more" if len(spread.outliers) > 4 else ""
    how = f"{verb} {FACTOR:g} times more or less than the median"
    return (
        f"Of the {spread.group}, these {how.replace('differs', 'differ')}: {named}{more}; {middle}."
    )


def _outlier(each: StandOut) -> str:
    return f"{each.name} ({_share(each.ratio)})"


def _add_ratios(page: Page, cells: Sequence[Cell], what: str, meaning: str) -> None:
    page.heading("By layer and kind of module")
    _add_heat(page, cells, lambda m: 100 * m.ratio, lambda m: f"{_share(m.ratio)}", f"{what} in %")
    page.explain(meaning)
    page.table(*_ratio_table(cells), f"{what} in %", grid=True)


def _add_unchanged(page: Page, cells: Sequence[Cell], what: str) -> None:
    """A heat map of the share of equal numbers, if it was counted everywhere."""
    if any(cell.measure.unchanged_share is None for cell in cells):
        return
    page.heading("What stayed the same")
    _add_heat(
        page,
        cells,
        lambda m: 100 * (m.unchanged_share or 0.0),
        lambda m: f"{_share(m.unchanged_share or 0.0)}",
        f"numbers that {what}, in %",
    )
    page.explain(f"the colour is the share of numbers that {what}, bit for bit; {_OF_UNCHANGED}")


def _add_sizes(page: Page, found: Inspection) -> None:
    page.heading("Parameters by layer and kind of module")
    cells = [_cell_of(size) for size in found.sizes]
    _add_heat(
        page,
        cells,
        lambda measure: measure.parameters,
        lambda measure: f"{measure.parameters:,} in {measure.tensors:,} tensors",
        "number of parameters",
    )
    page.explain(_OF_SIZES)


def _cell_of(size: Size) -> Cell:
    """A size as a cell of the grid; its norms are not known, and not shown."""
    return Cell(size.place, Measure(size.tensors, size.parameters, math.nan, math.nan))


def _add_heat(
    page: Page,
    cells: Sequence[Cell],
    value: Callable[[Measure], float],
    label: Callable[[Measure], str],
    meaning: str,
) -> None:
    """A heat map for each stack of layers; modules outside of them are in the first one."""
    rows = list(grid_rows(cells, _ROWS))
    stacks = list(dict.fromkeys(row.stack for row in rows if row.stack)) or [""]
    kinds = {kind: kind for kind in kinds_in_layers(cells)}
    most = max(
        (v for row in rows for v in _values(row, kinds, value) if v is not None), default=0.0
    )
    for stack in stacks:
        own = [row for row in rows if row.stack == stack or (stack == stacks[0] and not row.stack)]
        there = {kind for row in own for kind in row.parts(kinds)}
        columns = {kind: kind for kind in kinds if kind in there}
        if len(stacks) > 1:
            more = "" if own[-1].stack else ", and modules outside the layers"
            page.paragraph(f"Layers of {stack}{more}")
        page.figure(
            heat_map(
                [_values(row, columns, value) for row in own],
                rows=[row.label for row in own],
                columns=[*columns, _ALL],
                labels=[_labels(row, columns, label) for row in own],
                meaning=meaning,
                x="kind of module",
                y="layer",
                low=0.0,
                high=most,
            )
        )


def _values(
    row: GridRow, columns: dict[str, str], value: Callable[[Measure], float]
) -> list[float | None]:
    parts = row.parts(columns)
    own = [value(total(parts[column])) if column in parts else None for column in columns]
    return [*own, value(total(cell.measure for cell in row.cells))]


def _labels(row: GridRow, columns: dict[str, str], label: Callable[[Measure], str]) -> list[str]:
    parts = row.parts(columns)
    own = [label(total(parts[column])) if column in parts else "" for column in columns]
    return [*own, label(total(cell.measure for cell in row.cells))]


def _ratio_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[TableCell]]]:
    """The numbers of the heat map, with totals, and cosines if they are known."""
    kinds = {kind: kind for kind in kinds_in_layers(cells)}
    rows = list(grid_rows(cells, _ROWS))
    titles = {row.stack for row in rows if row.stack}
    cosines = any(cell.measure.cosine is not None for cell in cells)
    heads = ["layer", _ALL, *(["cosine"] if cosines else []), *kinds]
    lines = []
    for row in [*rows, GridRow("", _ALL, tuple(cells))]:
        name = f"{row.stack} {row.label}" if row.stack and len(titles) > 1 else row.label
        *texts, whole = _labels(row, kinds, lambda measure: percent(measure.ratio))
        every = total(cell.measure for cell in row.cells).cosine
        sides = [whole, *(["" if every is None else f"{every:.5f}"] if cosines else [])]
        lines.append([TableCell(name), *map(TableCell, [*sides, *texts])])
    return heads, lines


def _add_groups(page: Page, found: Inspection) -> None:
    page.heading("Tensors")
    rows = [
        [
            TableCell(group.pattern),
            TableCell(group.dtype),
            TableCell(" × ".join(map(str, group.shape)) or "scalar"),
            TableCell(f"{group.tensors:,}"),
            TableCell(f"{group.parameters:,}"),
        ]
        for group in found.groups[:_GROUPS]
    ]
    more = len(found.groups) - _GROUPS
    caption = f"{_GROUPS} groups of {len(found.groups)}; report.json has all" if more > 0 else ""
    page.table(["tensors", "dtype", "shape", "count", "parameters"], rows, caption)


def _add_most_changed(page: Page, found: Comparison) -> None:
    changed = [
        (tensor.name, tensor.measure)
        for tensor in found.tensors
        if tensor.measure is not None and tensor.measure.delta
    ]
    if not changed:
        return
    changed.sort(key=lambda each: each[1].ratio, reverse=True)
    page.heading("The tensors that differ most")
    rows = [
        [
            TableCell(name),
            TableCell(f"{_share(measure.ratio)}"),
            TableCell("" if measure.cosine is None else f"{measure.cosine:.5f}"),
            TableCell(f"{_share(measure.unchanged_share or 0)}"),
        ]
        for name, measure in changed[:_MOST_CHANGED]
    ]
    page.table(["tensor", "‖B − A‖ / ‖A‖", "cosine", "equal numbers"], rows, "")


def _add_list(page: Page, heading: str, lines: Iterable[str], folder: Path) -> None:
    said = [_shared(line, folder) for line in lines]
    if said:
        page.heading(heading)
        page.bullets(said)
