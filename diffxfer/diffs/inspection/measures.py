"""Measures of how much tensors differ, and their totals over many tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffxfer.diffs.inspection.places import Place


@dataclass(frozen=True, slots=True)
class Measure:
    """How much some tensors differ.

    Attributes:
        tensors: number of tensors.
        parameters: number of elements.
        delta: ‖Δ‖₂, where Δ is finetuned − base, or B − A if A and B are compared.
        base: ‖base‖₂, or ‖A‖₂.
        unchanged: number of equal elements; None if they were not counted.
        other: ‖B‖₂; None for a diff vector, which does not know ‖finetuned‖.
    """

    tensors: int
    parameters: int
    delta: float
    base: float
    unchanged: int | None = None
    other: float | None = None

    @property
    def ratio(self) -> float:
        """‖Δ‖ / ‖base‖; infinite if only base is zero."""
        if self.base:
            return self.delta / self.base
        return math.inf if self.delta else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between A and B; None if one is zero or ‖B‖ is not known."""
        if not self.base or not self.other:
            return None
        # 1 − cos = (‖Δ‖² − (‖A‖ − ‖B‖)²) / 2‖A‖‖B‖ keeps its precision if A and B are nearly
        # equal, unlike A·B. The factors are divided first, since squares may overflow.
        apart = abs(self.base - self.other)
        product = (self.delta - apart) / self.base * ((self.delta + apart) / self.other)
        return min(1.0, max(-1.0, 1.0 - product / 2))

    @property
    def unchanged_share(self) -> float | None:
        """The share of equal elements; None if it is not known."""
        if self.unchanged is None or not self.parameters:
            return None
        return self.unchanged / self.parameters

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values; infinity becomes null."""
        found: dict[str, Any] = {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "delta_norm": self.delta,
            "base_norm": self.base,
            "ratio": self.ratio if math.isfinite(self.ratio) else None,
            "unchanged": self.unchanged,
        }
        if self.other is not None:
            found |= {"other_norm": self.other, "cosine": self.cosine}
        return found


@dataclass(frozen=True, slots=True)
class Cell:
    """The tensors of one place in a model: one kind of module in one layer.

    Attributes:
        place: the layer and kind of module.
        measure: how much they differ.
    """

    place: Place
    measure: Measure

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        return {**_place_as_json(self.place), **self.measure.as_json()}


@dataclass(frozen=True, slots=True)
class Size:
    """The size of one place in a model.

    Attributes:
        place: the layer and kind of module.
        tensors: number of tensors.
        parameters: number of elements.
    """

    place: Place
    tensors: int
    parameters: int

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        return {
            **_place_as_json(self.place),
            "tensors": self.tensors,
            "parameters": self.parameters,
        }


def _place_as_json(place: Place) -> dict[str, Any]:
    layer = place.layer if place.stack else None
    return {"stack": place.stack or None, "layer": layer, "kind": place.kind}


def total(measures: Iterable[Measure]) -> Measure:
    """The total of several measures.

    Args:
        measures: measures of disjoint sets of tensors.
    """
    parts = list(measures)
    unchanged = [part.unchanged for part in parts if part.unchanged is not None]
    others = [part.other for part in parts if part.other is not None]
    return Measure(
        tensors=sum(part.tensors for part in parts),
        parameters=sum(part.parameters for part in parts),
        delta=math.hypot(*(part.delta for part in parts)),
        base=math.hypot(*(part.base for part in parts)),
        unchanged=sum(unchanged) if len(unchanged) == len(parts) else None,
        other=math.hypot(*others) if others and len(others) == len(parts) else None,
    )


def cells(measures: Iterable[tuple[Place, Measure]]) -> tuple[Cell, ...]:
    """Group measures by place.

    Args:
        measures: measures of single tensors, each with its place.

    Returns:
        One cell per place, in the order of stacks and layers; places outside any stack come first.
    """
    found: dict[Place, list[Measure]] = {}
    for place, measure in measures:
        found.setdefault(place, []).append(measure)
    return tuple(Cell(place, total(found[place])) for place in sorted(found))


def sizes(parameters: Iterable[tuple[Place, int]]) -> tuple[Size, ...]:
    """Group numbers of parameters by place.

    Args:
        parameters: of single tensors, each with its place.

    Returns:
        One size per place, in the order of `cells`.
    """
    found: dict[Place, list[int]] = {}
    for place, count in parameters:
        found.setdefault(place, []).append(count)
    return tuple(Size(place, len(found[place]), sum(found[place])) for place in sorted(found))


def percent(ratio: float) -> str:
    """A share in percent, in four characters.

    Args:
        ratio: 0 or more, 1 for all of it.
    """
    value = 100 * ratio
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "∞"
    for least, digits in ((99.95, 0), (9.995, 1), (0.995, 2), (0.0095, 2)):
        if least <= value < 9999.5:
            return f"{value:.{digits}f}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
