"""How far base + Δ is from the fine-tune, where Δ is stored with a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.artifact.kept import layer_of, natural

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diffxfer.diffs.artifact.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Distance:
    """How far base + a stored Δ is from a fine-tune, in a tensor or in several.

    Attributes:
        name: of the tensor or the layer, ``""`` for the whole model.
        error_norm: ‖base + stored Δ − finetuned‖₂.
        delta_norm: ‖finetuned − base‖₂.
    """

    name: str
    error_norm: float
    delta_norm: float

    @property
    def ratio(self) -> float | None:
        """‖error‖/‖Δ‖: 0 is the fine-tune, 1 as far as base; None if Δ is zero and error not."""
        if not self.delta_norm:
            return None if self.error_norm else 0.0
        return self.error_norm / self.delta_norm


def by_layer(distances: Iterable[Distance]) -> tuple[Distance, ...]:
    """The distance in each layer, in the order of their names and numbers.

    Args:
        distances: those of tensors.
    """
    layers: dict[str, list[Distance]] = {}
    for distance in distances:
        layers.setdefault(layer_of(distance.name), []).append(distance)
    return tuple(
        together(layers[name], name) for name in sorted(layers, key=lambda name: natural(name))
    )


def together(distances: Iterable[Distance], name: str = "") -> Distance:
    """The distance in several tensors.

    Args:
        distances: those of the tensors.
        name: what they are together.
    """
    known = list(distances)
    error, size = (
        math.sqrt(math.fsum(getattr(distance, key) ** 2 for distance in known))
        for key in ("error_norm", "delta_norm")
    )
    return Distance(name, error, size)


def worst_of(distances: Iterable[Distance]) -> Distance:
    """The largest error relative to Δ, the first one of equals.

    Args:
        distances: those of tensors, at least one.
    """
    return max(distances, key=lambda each: math.inf if each.ratio is None else each.ratio)


def in_words(distances: Sequence[Distance]) -> str:
    """The error in the whole model, and the worst one.

    Args:
        distances: those of tensors, at least one.
    """
    worst = worst_of(distances)
    return (
        f"‖error‖ is {percent(together(distances).ratio)} of ‖Δ‖, and at most"
        f" {percent(worst.ratio)}, in {worst.name}"
    )


def percent(ratio: float | None) -> str:
    """A ratio for people.

    Args:
        ratio: of a `Distance`.
    """
    return "∞" if ratio is None else f"{ratio:.2%}"


def recorded(manifest: Manifest) -> tuple[Distance, ...]:
    """The errors that the manifest of a lossy diff vector records, 0 for exact tensors.

    Args:
        manifest: the manifest.

    Returns:
        One of each tensor of Δ whose norm is finite; nothing if the diff vector is not lossy.
    """
    if manifest.lossy is None:
        return ()
    return tuple(
        Distance(name, entry.error_norm or 0.0, entry.delta_norm)
        for name, entry in manifest.tensors.items()
        if entry.delta_norm is not None
    )


def distances_as_json(distances: Sequence[Distance]) -> dict[str, object]:
    """The distance in the whole model, in each layer and in each tensor, as JSON values.

    ``"worst"`` is the name of the tensor with the largest ratio.

    Args:
        distances: those of tensors.
    """
    layers, tensors = map(_listed, (by_layer(distances), distances))
    (whole,) = _listed([together(distances)])
    worst = worst_of(distances).name if distances else None
    return {**whole, "worst": worst, "layers": layers, "tensors": tensors}


def _listed(distances: Iterable[Distance]) -> list[dict[str, object]]:
    return [
        {"name": d.name, "error_norm": d.error_norm, "delta_norm": d.delta_norm, "ratio": d.ratio}
        for d in distances
    ]
