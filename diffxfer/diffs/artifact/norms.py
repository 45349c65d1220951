"""The size of a diff vector relative to its base, by kind of tensor, from the manifest alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import pattern

if TYPE_CHECKING:
    from diffxfer.diffs.artifact.manifest import Manifest


@dataclass(frozen=True, slots=True)
class KindNorms:
    """Tensors whose names differ only in numbers.

    Attributes:
        pattern: their names with every number replaced by ``*``.
        tensors: number of tensors.
        delta: ‖Δ‖₂ over all of them.
        base: ‖base‖₂ over all of them.
    """

    pattern: str
    tensors: int
    delta: float
    base: float

    @property
    def ratio(self) -> float:
        """‖Δ‖ / ‖base‖; infinite if only base is zero."""
        if self.base:
            return self.delta / self.base
        return math.inf if self.delta else 0.0


def norms_by_kind(manifest: Manifest) -> tuple[KindNorms, ...]:
    """The norms in a diff vector's manifest, grouped by kind of tensor.

    Args:
        manifest: the manifest of a diff vector.

    Returns:
        One entry per kind, in the order of the tensors; the last one is named ``"all"``.
    """
    squares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, entry in manifest.tensors.items():
        if entry.delta_norm is None or entry.base_norm is None:
            continue
        for kind in (pattern(name), "all"):
            sums = squares[kind]
            sums[0] += 1
            sums[1] += entry.delta_norm**2
            sums[2] += entry.base_norm**2
    kinds = sorted(squares, key=lambda kind: kind == "all")
    return tuple(
        KindNorms(kind, int(count), math.sqrt(delta), math.sqrt(base))
        for kind, (count, delta, base) in ((kind, squares[kind]) for kind in kinds)
    )
