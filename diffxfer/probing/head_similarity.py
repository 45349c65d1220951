"""How alike the attention of two models is: head by head, with baselines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, slots=True)
class HeadSimilarity:
    """One measure of similarity for each pair of corresponding heads, with its baselines.

    A similarity is a mean over query positions of all rows; 1 if the distributions are equal.

    Attributes:
        layers: the similarity of corresponding heads: for each layer, one number for each head.
        mean: the mean of these.
        other_heads: the mean for pairs of different heads of the same layer; None if no layer has
            two heads.
        uniform: the mean for one model's attention and equal attention to all allowed positions.
        other_heads_by_layer: `other_heads`, for each layer.
        uniform_by_layer: `uniform`, for each layer.
        permuted: the mean for one model and a copy of the other whose heads were permuted.
    """

    layers: tuple[tuple[float, ...], ...]
    mean: float
    other_heads: float | None
    uniform: float
    other_heads_by_layer: tuple[float | None, ...]
    uniform_by_layer: tuple[float, ...]
    permuted: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "layers": [list(heads) for heads in self.layers],
            "mean": self.mean,
            "other_heads": self.other_heads,
            "uniform": self.uniform,
            "permuted": self.permuted,
            "other_heads_by_layer": list(self.other_heads_by_layer),
            "uniform_by_layer": list(self.uniform_by_layer),
        }

    def with_permuted(self, mean: float | None) -> HeadSimilarity:
        """The same with the baseline of a permuted copy.

        Args:
            mean: the mean similarity with the permuted copy.
        """
        return replace(self, permuted=mean)


class LayerSums:
    """Sums over query positions of the similarities of a layer.

    Args:
        heads: the number of heads of the layer.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.positions = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(
        self, a: torch.Tensor, b: torch.Tensor, allowed: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Add rows.

        Args:
            a: a model's attention, shape `(heads, queries, keys)`, float64.
            b: the other model's.
            allowed: for each model, where a key is allowed, shape `(queries, keys)`.
        """
        ours, theirs = (mask.to(a.device) for mask in allowed)
        # A query with only one allowed key says nothing: the first position of a causal model.
        queries = (ours.sum(-1) > 1) & (theirs.sum(-1) > 1)
        a, b = a[:, queries], b.to(a.device)[:, queries]
        self.positions += int(queries.sum())
        self._add("cosine", _cosines(a, b))
        self._add("other cosine", _other_cosines(a, b))
        entropies = _entropy(a), _entropy(b)
        self._add("divergence", _divergence(a, b, *entropies))
        other = a.new_zeros(self.heads)
        for shift in shifts(self.heads):
            moved = [values.roll(shift, 0) for values in (b, entropies[1])]
            other += _divergence(a, moved[0], entropies[0], moved[1])
        self._add("other divergence", other)
        for values, mask, entropy in ((a, ours, entropies[0]), (b, theirs, entropies[1])):
            uniform = mask[queries].to(a.dtype)
            uniform = (uniform / uniform.sum(-1, keepdim=True))[None]
            self._add("uniform cosine", _cosines(values, uniform) / 2)
            divergence = _divergence(values, uniform, entropy, _entropy(uniform))
            self._add("uniform divergence", divergence / 2)

    def _add(self, key: str, values: torch.Tensor) -> None:
        self.sums[key] = self.sums[key] + values if key in self.sums else values

    def _means(self, key: str) -> list[float]:
        return [float(value) / self.positions for value in self.sums[key].cpu()]

    def cosine(self) -> tuple[list[float], float | None, float]:
        """Means over positions: of each head, of pairs of other heads, with uniform attention."""
        pairs = self.heads - 1
        other = _mean(self._means("other cosine")) / pairs if pairs else None
        return self._means("cosine"), other, _mean(self._means("uniform cosine"))

    def jensen_shannon(self) -> tuple[list[float], float | None, float]:
        """The same of the Jensen-Shannon similarity."""
        pairs = len(shifts(self.heads))
        other = 1 - _mean(self._means("other divergence")) / pairs if pairs else None
        corresponding = [1 - value for value in self._means("divergence")]
        return corresponding, other, 1 - _mean(self._means("uniform divergence"))


def shifts(heads: int) -> tuple[int, ...]:
    """By how many places heads are shifted for the Jensen-Shannon similarity of other heads.

    All pairs of different heads up to five heads; of more, the pairs of four shifts, because each
    needs another logarithm of every weight. The choice is the same with the models swapped.

    Args:
        heads: the number of heads of a layer.
    """
    return tuple(sorted({1, heads // 2, heads - heads // 2, heads - 1} & set(range(1, heads))))


def gather(
    layers: Sequence[tuple[list[float], float | None, float]],
) -> HeadSimilarity:
    """One measure for all layers.

    Args:
        layers: what `LayerSums.cosine` or `LayerSums.jensen_shannon` returns, for each layer.
    """
    heads = tuple(tuple(found) for found, _, _ in layers)
    other = tuple(found for _, found, _ in layers)
    uniform = tuple(found for _, _, found in layers)
    known = [value for value in other if value is not None]
    return HeadSimilarity(
        layers=heads,
        mean=_mean([value for layer in heads for value in layer]),
        other_heads=_mean(known) if known else None,
        uniform=_mean(uniform),
        other_heads_by_layer=other,
        uniform_by_layer=uniform,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _unit(values: torch.Tensor) -> torch.Tensor:
    """Divide each distribution by its norm; one without any weight stays zero."""
    norms: torch.Tensor = values.norm(dim=-1, keepdim=True)
    return values / norms.where(norms > 0, norms.new_ones(()))


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum over queries of the cosine, for each head."""
    return (_unit(a) * _unit(b)).sum((-1, -2))


def _other_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum over queries, and over all heads but the same of the other model.

    The cosine is linear in the unit vectors, so their sum stands for all pairs.
    """
    a, b = _unit(a), _unit(b)
    return (a * (b.sum(0, keepdim=True) - b)).sum((-1, -2))


def _entropy(values: torch.Tensor) -> torch.Tensor:
    """The entropy of each distribution in bits, shape `(heads, queries)`."""
    import torch

    nats: torch.Tensor = -torch.special.xlogy(values, values).sum(-1)
    return nats / math.log(2)


def _divergence(
    a: torch.Tensor, b: torch.Tensor, entropy_a: torch.Tensor, entropy_b: torch.Tensor
) -> torch.Tensor:
    """The sum over queries of the Jensen-Shannon divergence in bits, for each head."""
    return (_entropy((a + b) / 2) - (entropy_a + entropy_b) / 2).sum(-1)
