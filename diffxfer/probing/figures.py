"""Distances between models as figures: lengths, angles and counts over some tensors.

Three steps between models are measured: Δ = finetuned − base is what fine-tuning did, the shift =
target − base is what the successor did, and the gain = direct − target is what fine-tuning the
target itself did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from diffxfer.streaming.statistics import exact_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diffxfer.diffs.inspection.places import Place

    _Key: TypeAlias = tuple[str, int, str]

STEPS = 10
"""The number of sums of the kernel `distances`; those of `gains` follow them."""


@dataclass(frozen=True, slots=True)
class GainFigures:
    """The step from the target to its own fine-tune, compared with Δ.

    Attributes:
        parameters: number of elements that all four models have.
        direct_norm: ‖direct‖₂.
        gain_norm: ‖direct − target‖₂.
        cosine_delta_gain: the cosine of the angle between Δ and direct − target; None if one is 0.
        sign_agreement: of the elements where neither is 0, the share where both have the same
            sign; 0.5 is chance. None if there are no such elements.
        unchanged: the share of elements where direct = target.
    """

    parameters: int
    direct_norm: float
    gain_norm: float
    cosine_delta_gain: float | None
    sign_agreement: float | None
    unchanged: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Distances over some tensors, in float64.

    Attributes:
        tensors: number of tensors.
        parameters: number of elements that the three models have.
        finetuned_norm: ‖finetuned‖₂.
        base_norm: ‖base‖₂.
        target_norm: ‖target‖₂.
        delta_norm: ‖Δ‖₂, the length of the step from base to finetuned.
        shift_norm: ‖target − base‖₂, the length of the step from base to target.
        ratio: ‖target − base‖ / ‖Δ‖; None if Δ is 0.
        relative_delta: ‖Δ‖ / ‖base‖; None if base is 0.
        relative_shift: ‖target − base‖ / ‖base‖; None if base is 0.
        cosine_base_target: the cosine of the angle between base and target; None if one is 0.
        cosine_delta_shift: the cosine of the angle between Δ and target − base; None if one is 0.
        sign_agreement: of the elements where neither Δ nor target − base is 0, the share where
            both have the same sign; 0.5 is chance. None if there are no such elements.
        unchanged_finetuned: the share of elements where finetuned = base.
        unchanged_target: the share of elements where target = base.
        direct: the step from the target to its own fine-tune; None without one.
    """

    tensors: int
    parameters: int
    finetuned_norm: float
    base_norm: float
    target_norm: float
    delta_norm: float
    shift_norm: float
    ratio: float | None
    relative_delta: float | None
    relative_shift: float | None
    cosine_base_target: float | None
    cosine_delta_shift: float | None
    sign_agreement: float | None
    unchanged_finetuned: float | None
    unchanged_target: float | None
    direct: GainFigures | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        from dataclasses import asdict

        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sums:
    """What the kernels have summed over one tensor.

    Attributes:
        parts: the sums of its tasks, and the number of elements of each; a tensor has two tasks if
            direct lacks some of its rows.
    """

    parts: tuple[tuple[int, tuple[float, ...]], ...]

    @property
    def is_finite(self) -> bool:
        """Whether the tensor has no NaN or infinity in any model."""
        return all(math.isfinite(value) for _, sums in self.parts for value in sums)


def figures(tensors: Iterable[Sums]) -> Figures:
    """The figures over some tensors.

    Args:
        tensors: the sums of each.
    """
    every = [*tensors]
    parts = [part for sums in every for part in sums.parts]
    parameters = sum(count for count, _ in parts)
    sums = _columns([sums[:STEPS] for _, sums in parts], STEPS)
    finetuned, base, target, delta, shift = map(math.sqrt, sums[:5])
    product, unchanged, unmoved, both, agreeing = sums[5:]
    return Figures(
        tensors=len(every),
        parameters=parameters,
        finetuned_norm=_short(finetuned),
        base_norm=_short(base),
        target_norm=_short(target),
        delta_norm=_short(delta),
        shift_norm=_short(shift),
        ratio=_over(shift, delta),
        relative_delta=_over(delta, base),
        relative_shift=_over(shift, base),
        cosine_base_target=_angle_of_models(base, target, shift),
        cosine_delta_shift=_cosine(product, delta, shift),
        sign_agreement=_share(agreeing, both),
        unchanged_finetuned=_share(unchanged, parameters),
        unchanged_target=_share(unmoved, parameters),
        direct=_gain([part for part in parts if len(part[1]) > STEPS]),
    )


def _gain(parts: Sequence[tuple[int, tuple[float, ...]]]) -> GainFigures | None:
    if not parts:
        return None
    parameters = sum(count for count, _ in parts)
    sums = _columns([sums[STEPS:] for _, sums in parts], 7)
    direct, delta, gain = map(math.sqrt, sums[:3])
    unchanged, both, agreeing = sums[4:]
    return GainFigures(
        parameters,
        _short(direct),
        _short(gain),
        _cosine(sums[3], delta, gain),
        _share(agreeing, both),
        _share(unchanged, parameters),
    )


def _columns(rows: Sequence[tuple[float, ...]], count: int) -> list[float]:
    return [exact_sum([row[place] for row in rows]) for place in range(count)]


def _short(value: float) -> float:
    # Nine digits, because the last digits of a block's sum depend on the processor.
    return float(f"{value:.9g}")


def _over(above: float, below: float) -> float | None:
    return _short(above / below) if below else None


def _share(count: float, of: float) -> float | None:
    return count / of if of else None


def _cosine(product: float, one: float, other: float) -> float | None:
    if not one or not other:
        return None
    return round(min(1.0, max(-1.0, product / one / other)), 9)


def _angle_of_models(base: float, target: float, shift: float) -> float | None:
    """The cosine of base and target, from lengths alone: precise if they are nearly equal."""
    if not base or not target:
        return None
    apart = abs(base - target)
    product = (shift - apart) / base * ((shift + apart) / target)
    return round(min(1.0, max(-1.0, 1.0 - product / 2)), 12)


@dataclass(frozen=True, slots=True)
class Cell:
    """The figures of one place in a model.

    Attributes:
        stack: the name of its stack of layers; empty outside any stack.
        layer: the layer's number; None outside any stack, or over all layers.
        kind: the kind of module, such as ``"q"``; None over all kinds.
        figures: its figures.
    """

    stack: str
    layer: int | None
    kind: str | None
    figures: Figures

    @property
    def name(self) -> str:
        """What it is, for a person: ``"layers.3 q"``."""
        layer = "" if self.layer is None else f"{self.stack}.{self.layer}"
        return f"{layer} {self.kind or ''}".strip() or self.stack

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        place = {"stack": self.stack or None, "layer": self.layer, "kind": self.kind}
        return {**place, **self.figures.as_json()}


def by_place(measured: Iterable[tuple[Place, Sums]]) -> tuple[Cell, ...]:
    """The figures of each kind of module in each layer, in the order of stacks and layers.

    Args:
        measured: the sums of single tensors, each with its place.
    """
    groups = _grouped((place, (place.stack, place.layer, place.kind), s) for place, s in measured)
    return tuple(Cell(p.stack, p.layer if p.stack else None, p.kind, f) for p, f in groups)


def by_layer(measured: Iterable[tuple[Place, Sums]]) -> tuple[Cell, ...]:
    """The figures of each layer, over all kinds of modules; what is outside the layers is left out.

    Args:
        measured: the sums of single tensors, each with its place.
    """
    inside = [(place, sums) for place, sums in measured if place.stack]
    groups = _grouped((place, (place.stack, place.layer, ""), s) for place, s in inside)
    return tuple(Cell(place.stack, place.layer, None, found) for place, found in groups)


def by_kind(measured: Iterable[tuple[Place, Sums]]) -> tuple[Cell, ...]:
    """The figures of each kind of module, over all layers of a stack.

    Args:
        measured: the sums of single tensors, each with its place.
    """
    groups = _grouped((place, (place.stack, -1, place.kind), s) for place, s in measured)
    return tuple(Cell(place.stack, None, place.kind, found) for place, found in groups)


def _grouped(keyed: Iterable[tuple[Place, _Key, Sums]]) -> list[tuple[Place, Figures]]:
    groups: dict[_Key, tuple[Place, list[Sums]]] = {}
    for place, key, sums in sorted(keyed, key=lambda item: item[1]):
        groups.setdefault(key, (place, []))[1].append(sums)
    return [(place, figures(found)) for place, found in groups.values()]
