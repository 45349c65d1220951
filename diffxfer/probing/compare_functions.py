"""What pairs of models compute on the same text: attention, hidden states, predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.models.loading import load, load_tokenizer, refill
from diffxfer.models.memory import free_memory
from diffxfer.probing.activations import activation_ratio, text_rows
from diffxfer.probing.agreement import compare_predictions
from diffxfer.probing.attention import compare_attention
from diffxfer.probing.hidden import compare_hidden
from diffxfer.probing.permute import permuted_source
from diffxfer.probing.row_data import borrow_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from diffxfer.models.loading import LoadedModel
    from diffxfer.models.source import ModelSource
    from diffxfer.probing.activations import ActivationRatio
    from diffxfer.probing.agreement import Agreement
    from diffxfer.probing.attention import AttentionComparison
    from diffxfer.probing.hidden import HiddenComparison
    from diffxfer.probing.row_data import ProbeRows

_LONG_ROWS = 32
"""Rows with fewer tokens on average say little about attention; the text that ships is used."""


@dataclass(frozen=True, slots=True)
class FunctionalPair:
    """What two models compute on the same text.

    Attributes:
        attention: the attention of corresponding heads, with a permuted copy as one baseline.
        hidden: the hidden states.
        agreement: the predictions on the rows; None without rows.
    """

    attention: AttentionComparison
    hidden: HiddenComparison
    agreement: Agreement | None


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how models run.

    Attributes:
        device: as PyTorch names it.
        dtype: the dtype in which they compute; None for that of their weights.
        batch_size: the most rows that go through a model together.
        seed: of permutations.
    """

    device: str
    dtype: torch.dtype | None
    batch_size: int
    seed: int

    def load(self, source: ModelSource) -> LoadedModel:
        """Load a model.

        Args:
            source: its weights.
        """
        return load(source, dtype=self.dtype, device=self.device)


def compare_pair(
    a: ModelSource, b: ModelSource, rows: ProbeRows | None, runtime: Runtime
) -> FunctionalPair:
    """Compare what two models compute; both are in memory, and freed afterwards.

    Args:
        a: the first model.
        b: the second one.
        rows: the rows; None for the text that ships.
        runtime: where and how they run.

    Raises:
        DiffxferError: if a model cannot be read or loaded, or a row cannot be tokenized.
    """
    names = a.label, b.label
    models = runtime.load(a), runtime.load(b)
    try:
        text, given = _rows(models, rows)
        options: dict[str, Any] = {"names": names, "batch_size": runtime.batch_size}
        attention = compare_attention(models[0].model, models[1].model, text, **options)
        hidden = compare_hidden(models[0].model, models[1].model, text, **options)
        agreement = None
        if rows is not None:
            agreement = compare_predictions(
                *(models[0].model, models[1].model, [row.ids for row in given]),
                names=names,
                kind=rows.kind,
                scored=None if rows.kind == "classifier" else [row.scored for row in given],
                batch_size=runtime.batch_size,
            )
        copy, _ = permuted_source(b, runtime.seed)
        if copy is not None and attention.reason is None:
            refill(models[1], copy)
            control = compare_attention(models[0].model, models[1].model, text, **options)
            attention = attention.with_permuted(control)
        return FunctionalPair(attention, hidden, agreement)
    finally:
        del models
        free_memory()


def _rows(
    models: tuple[LoadedModel, LoadedModel], rows: ProbeRows | None
) -> tuple[Sequence[Sequence[int]], Sequence[Any]]:
    """Token ids of text for attention, and the rows for predictions."""
    tokenizer = models[0].tokenizer
    given: Sequence[Any] = ()
    if rows is not None:
        borrow_template(rows, [model.tokenizer for model in models])
        given = rows.tokenize(tokenizer)
        if sum(len(row.ids) for row in given) >= _LONG_ROWS * len(given):
            return [row.ids for row in given], given
    return text_rows(tokenizer), given


def measure_activations(
    base: ModelSource, target: ModelSource, rows: ProbeRows | None, runtime: Runtime
) -> ActivationRatio:
    """Measure how much the target's layers change what base's compute, on rows or on a text.

    Args:
        base: base.
        target: the target.
        rows: the rows; None for the text that ships.
        runtime: where and how they run.

    Raises:
        DiffxferError: if a model cannot be loaded, or they have no linear layer in common.
    """
    tokenizer = load_tokenizer(base)
    tokens: Sequence[Sequence[int]]
    if rows is None:
        tokens = text_rows(tokenizer)
    else:
        borrow_template(rows, [tokenizer, load_tokenizer(target)])
        tokens = [row.ids for row in rows.tokenize(tokenizer)]
    models = runtime.load(base), runtime.load(target)
    try:
        return activation_ratio(models[0].model, models[1].model, tokens)
    finally:
        del models
        free_memory()
