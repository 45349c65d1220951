"""Which modules of which layers stand out."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffxfer.probing.figures import Cell

_LEAST_LAYERS = 4
_FACTOR = 2.0
_DEVIATIONS = 2 * 1.4826
"""Two standard deviations, in median distances from the median of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Standout:
    """A kind of module in one layer whose ratio is unlike that of its kind in other layers.

    Attributes:
        cell: the module and its figures.
        ratio: ‖target − base‖ / ‖Δ‖ in it; infinite if Δ is 0.
        median: the median ratio of its kind over the layers of the stack.
    """

    cell: Cell
    ratio: float
    median: float

    @property
    def factor(self) -> float:
        """How many times the median its ratio is; infinite or 0 if one of them is."""
        if not self.median or math.isinf(self.ratio):
            return math.inf
        return self.ratio / self.median

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has; infinity becomes null."""
        cell = self.cell
        place = {"stack": cell.stack, "layer": cell.layer, "kind": cell.kind}
        numbers = {"ratio": self.ratio, "median": self.median, "factor": self.factor}
        return {**place, **{n: v if math.isfinite(v) else None for n, v in numbers.items()}}


def find_standouts(cells: Iterable[Cell]) -> tuple[Standout, ...]:
    """The modules where the target moved much more, or much less, than elsewhere for its Δ.

    A cell's ratio ‖target − base‖ / ‖Δ‖ is compared with the median of its kind over the layers.
    It stands out if it is at least twice or at most half the median, and if it is farther from the
    median than two robust standard deviations of its kind (2 · 1.4826 times the median distance
    from the median, of the logarithms). Kinds with fewer than four layers have no verdict.

    Tried on the shipped family: nothing stands out. Noise that multiplied the shift of one of its
    28 matrices by 2, 3 and 4 made that matrix stand out in 10, 23 and 28 trials, and never another.

    Args:
        cells: the figures by layer and kind.

    Returns:
        Those that stand out, the farthest from their median first.
    """
    kinds: defaultdict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        found = cell.figures
        if cell.layer is not None and (found.delta_norm or found.shift_norm):
            kinds[cell.stack, cell.kind or ""].append(cell)
    every = [each for own in kinds.values() if len(own) >= _LEAST_LAYERS for each in _of_kind(own)]
    return tuple(sorted(every, key=lambda each: -_distance(each.factor)))


def _of_kind(cells: Sequence[Cell]) -> Iterator[Standout]:
    ratios = [_ratio(cell) for cell in cells]
    middle = median(ratios)
    if math.isinf(middle):  # fine-tuning left most layers as they are: there is no usual ratio
        return
    every = [Standout(cell, r, middle) for cell, r in zip(cells, ratios, strict=True)]
    apart = [_distance(each.factor) for each in every if each.ratio != middle]
    spread = median([*apart, *[0.0] * (len(every) - len(apart))])
    least = max(math.log(_FACTOR), _DEVIATIONS * spread)
    for each in every:
        if each.ratio != middle and _distance(each.factor) >= least:
            yield each


def _ratio(cell: Cell) -> float:
    ratio = cell.figures.ratio
    return math.inf if ratio is None else ratio


def _distance(factor: float) -> float:
    """How far a factor is from 1, as a logarithm."""
    return abs(math.log(factor)) if 0 < factor < math.inf else math.inf
