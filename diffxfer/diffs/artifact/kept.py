"""What an adapter keeps of Δ, layer by layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.artifact.manifest import FactorEntry

_LAYER = re.compile(r"(.*?(?:^|\.)\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerKept:
    """What an adapter keeps of a layer.

    Attributes:
        layer: its name, or that of a module outside the layers.
        kept: the share of ‖Δ‖² that is kept.
        ranks: the smallest and the largest rank, 0 without factors.
        bytes: the size in the adapter.
        full_bytes: the size of the whole Δ in the same dtype.
    """

    layer: str
    kept: float
    ranks: tuple[int, int]
    bytes: int
    full_bytes: int


def layer_of(name: str) -> str:
    """The layer of a tensor, such as ``model.layers.0``; its module if it is in none."""
    found = _LAYER.match(name)
    return found[1] if found else name.rpartition(".")[0]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names with their numbers in the order of the numbers.

    Args:
        name: a name such as ``model.layers.10``.
    """
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]


def share(factors: Mapping[str, FactorEntry]) -> float:
    """The share of ‖Δ‖² that is kept of some tensors, 1 if Δ is zero."""
    total = math.fsum(entry.delta_norm**2 for entry in factors.values())
    kept = math.fsum(entry.kept * entry.delta_norm**2 for entry in factors.values())
    return min(kept / total, 1.0) if total else 1.0


def by_layer(factors: Mapping[str, FactorEntry]) -> tuple[LayerKept, ...]:
    """What is kept of each layer, in the order of their names and numbers.

    Args:
        factors: what is kept of each tensor.
    """
    layers: dict[str, dict[str, FactorEntry]] = {}
    for name, entry in factors.items():
        layers.setdefault(layer_of(name), {})[name] = entry
    made = []
    for layer, inside in sorted(layers.items(), key=lambda item: natural(item[0])):
        ranks = [entry.rank for entry in inside.values() if entry.rank] or [0]
        sizes = [(entry.bytes, entry.full_bytes) for entry in inside.values()]
        totals = sum(size for size, _ in sizes), sum(full for _, full in sizes)
        made.append(LayerKept(layer, share(inside), (min(ranks), max(ranks)), *totals))
    return tuple(made)
