"""How alike the hidden states of two models are, layer by layer: linear CKA.

For hidden states X and Y of the same tokens, with centred columns, linear CKA is
‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414): 1 if one is
the other turned, mirrored or scaled as a whole, so it does not depend on the models' coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.probing.forward_pass import (
    ROW_TOKENS,
    TOKENS,
    batches,
    choose_layers,
    choose_rows,
    exact,
    run,
    undisturbed,
    why_not,
    without_head,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

    from diffxfer.probing.forward_pass import Batch

_HELD = 2**31
"""Bytes of cross-products that are held at once, unless one layer has more."""


@dataclass(frozen=True, slots=True)
class HiddenComparison:
    """The hidden states of two models for the same tokens.

    Attributes:
        pair: the names of the models.
        layers: linear CKA of each compared layer; None where a model's hidden states are all
            equal, as those of the embedding for a text of one token.
        mean: the mean of these.
        other_tokens: the mean if tokens are compared with other ones, half a row away. With fewer
            tokens than the hidden size even that is high, and `mean` says little.
        other_tokens_by_layer: the same for each layer.
        sampled_layers: the numbers of the compared layers; 0 is the output of the embedding.
        rows: the number of rows.
        tokens: their tokens.
        positions: tokens that were compared. The first of each row is left out: in many causal
            models its hidden state is so large that it alone would decide the figure.
        reason: why the models cannot be compared, in words; the figures are None then.
    """

    pair: tuple[str, str]
    layers: tuple[float | None, ...] = ()
    mean: float | None = None
    other_tokens: float | None = None
    other_tokens_by_layer: tuple[float | None, ...] = ()
    sampled_layers: tuple[int, ...] = ()
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "pair": list(self.pair),
            "layers": list(self.layers),
            "mean": self.mean,
            "other_tokens": self.other_tokens,
            "other_tokens_by_layer": list(self.other_tokens_by_layer),
            "sampled_layers": list(self.sampled_layers),
            "rows": self.rows,
            "tokens": self.tokens,
            "positions": self.positions,
            "reason": self.reason,
        }


def compare_hidden(
    a: PreTrainedModel,
    b: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    names: tuple[str, str] = ("a", "b"),
    layers: int | Sequence[int] | None = None,
    tokens: int = TOKENS,
    row_tokens: int = ROW_TOKENS,
    batch_size: int = 8,
    held_bytes: int = _HELD,
) -> HiddenComparison:
    """Compare the hidden states of two models for the same tokens, layer by layer.

    Cross-products of shape `(hidden size, hidden size)` are added up in float64, so memory does
    not grow with the text. Where those of all layers do not fit into `held_bytes`, the text goes
    through the models again for the other layers.

    Args:
        a: a loaded model.
        b: another one with as many layers; its hidden size may be another.
        rows: token ids.
        names: the names of the models, for the result.
        layers: how many of the last layers are compared, or the numbers of some, where 0 is the
            output of the embedding; None for all.
        tokens: no further row is taken once the rows have this many tokens.
        row_tokens: the most tokens of a row.
        batch_size: the most rows that go through the models together.
        held_bytes: the most memory for cross-products.

    Returns:
        CKA by layer, with a baseline; or the reason why there is none.

    Raises:
        OptionError: if `layers` are none of the models' layers.
    """
    models = (a, b)
    chosen = choose_rows(models, rows, tokens=tokens, row_tokens=row_tokens)
    if (reason := why_not(models, names, chosen)) is not None:
        return HiddenComparison(names, reason=reason)
    backbones = (without_head(a), without_head(b))
    with undisturbed(models):
        sizes = [_sizes(backbone, chosen[0]) for backbone in backbones]
        if (reason := _why_unlike(sizes, names)) is not None:
            return HiddenComparison(names, reason=reason)
        wanted = choose_layers(layers, range(len(sizes[0])))
        by_layer: tuple[float | None, ...] = ()
        others: tuple[float | None, ...] = ()
        for group in _groups(wanted, max(map(max, sizes)), held_bytes):
            sums = [_CrossProducts() for _ in group]
            for batch in batches(chosen, batch_size):
                _add(backbones, batch, group, sums)
            by_layer += tuple(one.cka("products") for one in sums)
            others += tuple(one.cka("others") for one in sums)
    if any(value is not None and math.isnan(value) for value in by_layer):
        return HiddenComparison(names, reason="hidden states of a model are not finite")
    return _result(names, chosen, wanted, by_layer, others)


def _result(
    names: tuple[str, str],
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    by_layer: tuple[float | None, ...],
    others: tuple[float | None, ...],
) -> HiddenComparison:
    return HiddenComparison(
        names,
        layers=by_layer,
        mean=_mean(by_layer),
        other_tokens=_mean(others),
        other_tokens_by_layer=others,
        sampled_layers=tuple(layers),
        rows=len(rows),
        tokens=sum(map(len, rows)),
        positions=sum(len(row) - 1 for row in rows),
    )


class _CrossProducts:
    """Sums over tokens of the products of two models' hidden states."""

    def __init__(self) -> None:
        self.positions = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, x: torch.Tensor, y: torch.Tensor, others: torch.Tensor) -> None:
        """Add tokens: hidden states of shape `(tokens, size)`, and those of y at other tokens."""
        self.positions += len(x)
        for key, value in (
            ("x", x.sum(0)),
            ("y", y.sum(0)),
            ("xx", x.T @ x),
            ("yy", y.T @ y),
            ("products", y.T @ x),
            ("others", others.T @ x),
        ):
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def cka(self, key: str) -> float | None:
        """Linear CKA; None if the hidden states of a model do not vary."""
        x, y = (self.sums[name] / self.positions for name in ("x", "y"))
        crossed = self._centred(key, y, x)
        norms = self._centred("xx", x, x) * self._centred("yy", y, y)
        return crossed**2 / norms if norms != 0 else None

    def _centred(self, key: str, left: torch.Tensor, right: torch.Tensor) -> float:
        """The Frobenius norm of a cross-product with centred columns, 0 if it is only rounding."""
        import torch

        products = self.sums[key]
        mean = self.positions * torch.outer(left, right)
        norm = float((products - mean).norm())
        return 0.0 if norm <= 1e-12 * float(products.norm()) else norm


def _add(
    models: tuple[PreTrainedModel, PreTrainedModel],
    batch: Batch,
    layers: Sequence[int],
    sums: Sequence[_CrossProducts],
) -> None:
    """Add the tokens of a batch to the sums of some layers."""
    import torch

    ours, theirs = (_states(model, batch, layers) for model in models)
    for x_all, y_all, one in zip(ours, theirs, sums, strict=True):
        x, y = x_all[:, 1:], y_all[:, 1:].to(x_all.device)
        half = y.shape[1] // 2
        # The halves change places, so that the figure is the same with the models swapped.
        others = torch.cat((y[:, half : 2 * half], y[:, :half], y[:, 2 * half :]), 1)
        one.add(*(exact(states.flatten(0, 1)) for states in (x, y, others)))


def _states(model: PreTrainedModel, batch: Batch, layers: Sequence[int]) -> list[torch.Tensor]:
    """Hidden states of some layers, each of shape `(rows, tokens, size)`."""
    found = run(model, batch, output_hidden_states=True).hidden_states
    return [found[layer] for layer in layers]


def _sizes(model: PreTrainedModel, row: Sequence[int]) -> list[int]:
    """The hidden size after the embedding and each layer; none if the model does not tell."""
    from diffxfer.probing.forward_pass import Batch

    outputs = run(model, Batch((0,), (tuple(row[:2]),)), output_hidden_states=True)
    return [int(state.shape[-1]) for state in getattr(outputs, "hidden_states", None) or ()]


def _why_unlike(sizes: Sequence[Sequence[int]], names: tuple[str, str]) -> str | None:
    for found, name in zip(sizes, names, strict=True):
        if not found:
            return f"{name} does not return its hidden states"
    if len(sizes[0]) != len(sizes[1]):
        layers = [f"{name} has {len(found) - 1}" for found, name in zip(sizes, names, strict=True)]
        return f"no layers correspond: {', '.join(layers)}"
    return None


def _groups(layers: Sequence[int], size: int, held_bytes: int) -> list[Sequence[int]]:
    """Layers whose cross-products fit into memory together."""
    together = max(1, held_bytes // (4 * 8 * size**2))
    return [layers[begin : begin + together] for begin in range(0, len(layers), together)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
