"""Whether corresponding heads of two models attend to the same tokens.

For each layer and head: the attention of both models on the same text, compared at every query
position by the cosine and by the Jensen-Shannon similarity (1 − divergence in bits). Attention is
alike even in unrelated models, because heads like to attend to the first token and to the near
past. So each figure stands beside baselines: other heads of the same layer, and equal attention to
all allowed tokens.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffxfer.probing.attention_capture import eager_attention, find_attention
from diffxfer.probing.forward_pass import (
    ROW_TOKENS,
    TOKENS,
    Batch,
    batches,
    choose_layers,
    choose_rows,
    undisturbed,
    why_not,
)
from diffxfer.probing.head_similarity import HeadSimilarity, LayerSums, gather

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from diffxfer.probing.attention_capture import Attention, AttentionLayers

_HELD = 2**29
"""Bytes of attention that are held at once, unless one layer of one row has more."""
_COMPARED = 2**20
"""Weights that are compared at once in float64, unless one row has more."""


@dataclass(frozen=True, slots=True)
class AttentionComparison:
    """The attention of two models on the same text.

    Attributes:
        pair: the names of the models.
        cosine: the cosine of the attention of corresponding heads, and of the baselines.
        jensen_shannon: the same of 1 − the Jensen-Shannon divergence in bits. Of more than five
            heads, `other_heads` has some of the pairs only.
        sampled_layers: the numbers of the compared layers; others were left out on request, or
            have no attention.
        attention_layers: how many layers of a model have attention.
        rows: the number of rows.
        tokens: their tokens.
        positions: query positions that were compared. Those that may attend to one token only, as
            the first one of a causal model, are left out: any two models agree there.
        reason: why the models cannot be compared, in words; the figures are None then.
    """

    pair: tuple[str, str]
    cosine: HeadSimilarity | None = None
    jensen_shannon: HeadSimilarity | None = None
    sampled_layers: tuple[int, ...] = ()
    attention_layers: int = 0
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    reason: str | None = None

    def with_permuted(self, control: AttentionComparison) -> AttentionComparison:
        """The same with the baseline of a permuted copy.

        Args:
            control: the comparison of the first model with a copy of the second whose heads were
                permuted, on the same rows and layers: the same function in other coordinates.
        """
        ours, theirs = ([found.cosine, found.jensen_shannon] for found in (self, control))
        cosine, divergence = (
            one and one.with_permuted(None if other is None else other.mean)
            for one, other in zip(ours, theirs, strict=True)
        )
        return replace(self, cosine=cosine, jensen_shannon=divergence)

    def as_json(self) -> dict[str, Any]:
        """The figures of the cosine, those of the Jensen-Shannon similarity below a key."""
        cosine: dict[str, Any] = {"layers": [], "mean": None, "other_heads": None}
        return {
            "pair": list(self.pair),
            **(cosine if self.cosine is None else self.cosine.as_json()),
            "jensen_shannon": self.jensen_shannon and self.jensen_shannon.as_json(),
            "sampled_layers": list(self.sampled_layers),
            "attention_layers": self.attention_layers,
            "rows": self.rows,
            "tokens": self.tokens,
            "positions": self.positions,
            "reason": self.reason,
        }


def compare_attention(
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
) -> AttentionComparison:
    """Compare the attention of corresponding heads of two models on the same text.

    Both models run with eager attention, and get back their own kind afterwards. The attention of
    a batch is held for as many layers as fit into `held_bytes`, and the batch runs again for the
    other layers.

    Args:
        a: a loaded model; a causal LM, an encoder, or either with any head.
        b: another one, with as many layers and heads.
        rows: token ids; text says more than short rows, in which attention has little choice.
        names: the names of the models, for the result.
        layers: how many of the last layers are compared, or the numbers of some; None for all.
        tokens: no further row is taken once the rows have this many tokens.
        row_tokens: the most tokens of a row.
        batch_size: the most rows that go through the models together.
        held_bytes: the most memory for attention weights of one model.

    Returns:
        The similarity of each head, with baselines; or the reason why there is none.

    Raises:
        OptionError: if `layers` are none of the models' layers.
    """
    models = (a, b)
    chosen = choose_rows(models, rows, tokens=tokens, row_tokens=row_tokens)
    if (reason := why_not(models, names, chosen)) is not None:
        return AttentionComparison(names, reason=reason)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eager_attention(model))
        stack.enter_context(undisturbed(models))
        found = _find_both(models, max(chosen, key=len), names)
        if isinstance(found, str):
            return AttentionComparison(names, reason=found)
        ours, theirs = found
        wanted = choose_layers(layers, ours.numbers)
        sums = {layer: LayerSums(ours.heads[layer]) for layer in wanted}
        for batch, group in _portions(ours, chosen, wanted, batch_size, held_bytes):
            _compare(ours, theirs, batch, group, sums)
    summary = AttentionComparison(
        names,
        sampled_layers=tuple(ours.numbers[layer] for layer in wanted),
        attention_layers=len(ours.numbers),
        rows=len(chosen),
        tokens=sum(map(len, chosen)),
        positions=max(found.positions for found in sums.values()),
    )
    return _with_figures(summary, list(sums.values()))


def _with_figures(summary: AttentionComparison, sums: Sequence[LayerSums]) -> AttentionComparison:
    """Add the means, or why there are none."""
    if not all(found.positions for found in sums):
        return AttentionComparison(summary.pair, reason="no token may attend to another one")
    cosine = gather([found.cosine() for found in sums])
    if not math.isfinite(cosine.mean):
        reason = "the attention of a model is not finite on these rows"
        return AttentionComparison(summary.pair, reason=reason)
    divergences = gather([found.jensen_shannon() for found in sums])
    return replace(summary, cosine=cosine, jensen_shannon=divergences)


def _find_both(
    models: tuple[PreTrainedModel, PreTrainedModel], row: Sequence[int], names: tuple[str, str]
) -> tuple[AttentionLayers, AttentionLayers] | str:
    """The layers of both models, or why no head corresponds to another, in words."""
    ours, theirs = (find_attention(model, row) for model in models)
    if isinstance(ours, str):
        return f"{names[0]} {ours}"
    if isinstance(theirs, str):
        return f"{names[1]} {theirs}"
    if ours.heads == theirs.heads and ours.numbers == theirs.numbers:
        return ours, theirs
    shapes = [
        f"{name} has {len(found.heads)} layers of {_count(found.heads)} heads"
        for found, name in zip((ours, theirs), names, strict=True)
    ]
    if shapes[0].removeprefix(names[0]) == shapes[1].removeprefix(names[1]):
        return f"{names[0]} and {names[1]} have attention in different layers"
    return f"no heads correspond: {', '.join(shapes)}"


def _count(heads: Sequence[int]) -> str:
    return " or ".join(map(str, sorted(set(heads))))


def _portions(
    found: AttentionLayers,
    rows: Sequence[tuple[int, ...]],
    wanted: Sequence[int],
    batch_size: int,
    held_bytes: int,
) -> Iterator[tuple[Batch, Sequence[int]]]:
    """Batches and layers whose attention fits into memory: smaller batches first."""
    item = next(found.model.parameters()).element_size()
    row_bytes = max(found.heads) * max(map(len, rows)) ** 2 * item
    size = min(batch_size, max(1, held_bytes // (row_bytes * len(wanted))))
    together = max(1, held_bytes // (row_bytes * size))
    for batch in batches(rows, size):
        for begin in range(0, len(wanted), together):
            yield batch, wanted[begin : begin + together]


def _compare(
    ours: AttentionLayers,
    theirs: AttentionLayers,
    batch: Batch,
    layers: Sequence[int],
    sums: dict[int, LayerSums],
) -> None:
    """Hold one model's attention in these layers, and compare the other's as it comes."""
    held: dict[int, Attention] = {}

    def compare(layer: int, attention: Attention) -> None:
        first = held.pop(layer)
        _, heads, queries, keys = first.weights.shape
        step = max(1, _COMPARED // (heads * queries * keys))
        for begin in range(0, len(batch.rows), step):
            a, may_a = first.of_rows(slice(begin, begin + step))
            b, may_b = attention.of_rows(slice(begin, begin + step))
            sums[layer].add(a, b, (may_a, may_b))

    ours.watch(batch, layers, held.__setitem__)
    theirs.watch(batch, layers, compare)
