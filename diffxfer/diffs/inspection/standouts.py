"""The layers and the kinds of modules that differ much more, or much less, than the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from diffxfer.diffs.inspection.measures import total

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from diffxfer.diffs.inspection.measures import Cell, Measure

FACTOR = 1.5
"""Whatever differs this many times as much as the median, or as little, stands out."""


@dataclass(frozen=True, slots=True)
class StandOut:
    """A layer, or a kind of module, and how much it differs.

    Attributes:
        name: such as ``"layer 2"`` or ``"norms"``.
        ratio: ‖Δ‖ / ‖base‖.
        times: its ratio divided by the median of its group.
    """

    name: str
    ratio: float
    times: float


@dataclass(frozen=True, slots=True)
class Spread:
    """How much the members of a group differ: the layers of a stack, or the kinds of modules.

    Attributes:
        group: such as ``"layers"``.
        middle: the median of their ratios.
        least: the member that differs least.
        most: the one that differs most.
        outliers: the members that stand out, the furthest from the median first.
    """

    group: str
    middle: float
    least: StandOut
    most: StandOut
    outliers: tuple[StandOut, ...]


def spreads(cells: Sequence[Cell]) -> tuple[Spread, ...]:
    """The layers of each stack, and the kinds of modules, that stand out.

    Args:
        cells: every place of a model.

    Returns:
        One spread for each group of three members or more whose median is not zero.
    """
    stacks = list(dict.fromkeys(cell.place.stack for cell in cells if cell.place.stack))
    groups: list[tuple[str, Mapping[str, list[Measure]]]] = []
    for stack in stacks:
        own = [cell for cell in cells if cell.place.stack == stack]
        where = "" if len(stacks) == 1 else f" of {stack}"
        layers = _grouped((f"layer {each.place.layer}{where}", each.measure) for each in own)
        groups.append((f"layers{where}", layers))
    inside = {cell.place.kind for cell in cells if cell.place.stack}
    kinds = _grouped((_kind(each, inside), each.measure) for each in cells)
    groups.append(("kinds of modules", kinds))
    return tuple(found for name, own in groups if (found := _spread(name, own)) is not None)


def _kind(cell: Cell, inside: set[str]) -> str:
    kind = cell.place.kind
    return f"{kind} outside the layers" if not cell.place.stack and kind in inside else kind


def _grouped(measures: Iterable[tuple[str, Measure]]) -> dict[str, list[Measure]]:
    found: dict[str, list[Measure]] = {}
    for name, measure in measures:
        found.setdefault(name, []).append(measure)
    return found


def _spread(group: str, members: Mapping[str, list[Measure]]) -> Spread | None:
    ratios = {name: total(own).ratio for name, own in members.items()}
    ratios = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    middle = median(ratios.values()) if len(ratios) > 2 else 0.0
    if not middle:
        return None
    found = [StandOut(name, ratio, ratio / middle) for name, ratio in ratios.items()]
    outliers = [each for each in found if not 1 / FACTOR < each.times < FACTOR]
    outliers.sort(key=lambda each: abs(math.log(each.times)) if each.times else math.inf)
    return Spread(
        group,
        middle,
        min(found, key=lambda each: each.ratio),
        max(found, key=lambda each: each.ratio),
        tuple(reversed(outliers)),
    )
