"""What pairs of models compute on the same text: attention, hidden states, predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diffxfer.models.loading import load, refill
from diffxfer.models.memory import free_memory
from diffxfer.probing.activations import ROW_TOKENS, activation_ratio, text_rows
from diffxfer.probing.agreement import Agreement, compare_predictions
from diffxfer.probing.attention import AttentionComparison, compare_attention
from diffxfer.probing.forward_pass import longest_row
from diffxfer.probing.hidden import HiddenComparison, compare_hidden
from diffxfer.probing.permute import permuted_source
from diffxfer.probing.row_data import borrow_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from diffxfer.models.loading import LoadedModel
    from diffxfer.models.source import ModelSource
    from diffxfer.probing.activations import ActivationRatio
    from diffxfer.probing.row_data import ProbeRows
    from diffxfer.probing.rows import TokenRow

_LONG_ROWS = 32
"""Rows with fewer tokens on average say little about attention; the text that ships is used."""

_UNLIKE = "the tokenizers of {} and {} give different tokens for the text"


@dataclass(frozen=True, slots=True)
class FunctionalPair:
    """What two models compute on the same text.

    Attributes:
        attention: the attention of corresponding heads, with a permuted copy as one baseline.
        hidden: the hidden states.
        agreement: the predictions on the rows; None without rows.
        ships: whether attention and hidden states are those of the text that ships.
    """

    attention: AttentionComparison
    hidden: HiddenComparison
    agreement: Agreement | None
    ships: bool


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
    models = runtime.load(a), runtime.load(b)
    try:
        texts = [_read(model.tokenizer, rows) for model in models]
        names = a.label, b.label
        agreement = None
        if rows is not None:
            agreement = _compare_predictions(models, names, rows, texts, runtime)
        # The last comparison turns the second model into its permuted copy.
        attention, hidden = _compare_insides(models, names, b, texts, runtime)
        return FunctionalPair(attention, hidden, agreement, texts[0].ships)
    finally:
        del models
        free_memory()


class _Text(NamedTuple):
    """What a tokenizer makes of the rows, and of the text for attention and hidden states."""

    given: Sequence[TokenRow]
    text: Sequence[Sequence[int]]
    ships: bool


def _read(tokenizer: Any, rows: ProbeRows | None) -> _Text:
    """Tokenize the rows; of short ones, attention says little, so the text that ships is used."""
    given: Sequence[TokenRow] = ()
    if rows is not None:
        borrow_template(rows, [tokenizer])
        given = rows.tokenize(tokenizer)
        if sum(len(row.ids) for row in given) >= _LONG_ROWS * len(given):
            return _Text(given, [row.ids for row in given], ships=False)
    return _Text(given, text_rows(tokenizer), ships=True)


def _compare_insides(
    models: tuple[LoadedModel, LoadedModel],
    names: tuple[str, str],
    second: ModelSource,
    texts: Sequence[_Text],
    runtime: Runtime,
) -> tuple[AttentionComparison, HiddenComparison]:
    """Compare attention, with a permuted copy of the second model as a baseline, and CKA."""
    if texts[0].text != texts[1].text:
        reason = _UNLIKE.format(*names)
        return AttentionComparison(names, reason=reason), HiddenComparison(names, reason=reason)
    pair = models[0].model, models[1].model
    options: dict[str, Any] = {"names": names, "batch_size": runtime.batch_size}
    hidden = compare_hidden(*pair, texts[0].text, **options)
    attention = compare_attention(*pair, texts[0].text, **options)
    if attention.reason is None:
        copy, _ = permuted_source(second, runtime.seed)
        if copy is not None:
            refill(models[1], copy)
            control = compare_attention(*pair, texts[0].text, **options)
            attention = attention.with_permuted(control)
    return attention, hidden


def _compare_predictions(
    models: tuple[LoadedModel, LoadedModel],
    names: tuple[str, str],
    rows: ProbeRows,
    texts: Sequence[_Text],
    runtime: Runtime,
) -> Agreement:
    given = texts[0].given
    if given != texts[1].given:
        return Agreement(names, rows.kind, reason=_UNLIKE.format(*names))
    return compare_predictions(
        *(models[0].model, models[1].model, [row.ids for row in given]),
        names=names,
        kind=rows.kind,
        scored=None if rows.kind == "classifier" else [row.scored for row in given],
        batch_size=runtime.batch_size,
    )


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
    models = runtime.load(base), runtime.load(target)
    try:
        tokenizer = models[0].tokenizer
        # Only base runs, so only its positions limit a row.
        most = min(ROW_TOKENS, longest_row(models[0].model) or ROW_TOKENS)
        tokens: Sequence[Sequence[int]]
        if rows is None:
            tokens = text_rows(tokenizer, row_tokens=most)
        else:
            borrow_template(rows, [tokenizer])
            tokens = [row.ids for row in rows.tokenize(tokenizer)]
        return activation_ratio(models[0].model, models[1].model, tokens)
    finally:
        del models
        free_memory()
