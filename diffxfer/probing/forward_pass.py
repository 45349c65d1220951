"""Rows of tokens through loaded models: which rows, in which batches, and what prevents it.

`compare_attention`, `compare_hidden` and `compare_predictions` share this. Only rows of the same
length share a batch, so nothing is padded: some models, such as those with convolutions, let the
padding change the tokens beside it.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch
    from transformers import PreTrainedModel

TOKENS = 8192
"""How many tokens of the text are compared if the caller does not say."""
ROW_TOKENS = 256
"""How many tokens of a row are used: attention takes memory by the square of this number."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of the same length that go through a model together.

    Attributes:
        numbers: the place of each row in the caller's order.
        rows: their tokens.
    """

    numbers: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    def tensors(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Token ids and attention mask, both of shape `(rows, tokens)`, for a model.

        Args:
            model: decides the device.
        """
        import torch

        ids = torch.tensor(self.rows, device=model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def vocabulary(model: PreTrainedModel) -> int:
    """The number of rows of a model's embedding.

    Args:
        model: a loaded model.
    """
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def longest_row(model: PreTrainedModel) -> int | None:
    """The number of tokens for which a model has positions; None if its config states none.

    Args:
        model: a loaded model.
    """
    import torch

    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa's positions begin after the id of the padding.
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings"):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return found if isinstance(found, int) and found > 0 else None


def choose_rows(
    models: Sequence[PreTrainedModel],
    rows: Sequence[Sequence[int]],
    *,
    tokens: int = TOKENS,
    row_tokens: int = ROW_TOKENS,
) -> list[tuple[int, ...]]:
    """The beginnings of the first rows, until they have enough tokens.

    A row of fewer than two tokens is left out: it has no position that is compared.

    Args:
        models: no row gets longer than the positions that each of them has.
        rows: token ids, in the order in which they are taken.
        tokens: no further row is taken once the rows have this many tokens.
        row_tokens: the most tokens of a row.
    """
    limits = [limit for limit in map(longest_row, models) if limit is not None]
    most = min([row_tokens, *limits])
    found: list[tuple[int, ...]] = []
    total = 0
    for row in rows:
        if total >= tokens:
            break
        if len(row) > 1:
            found.append(tuple(row[:most]))
            total += len(found[-1])
    return found


def why_not(
    models: Sequence[PreTrainedModel], names: Sequence[str], rows: Sequence[Sequence[int]]
) -> str | None:
    """Why the rows cannot go through the models, in words; None if they can.

    Args:
        models: loaded models.
        names: their names, for the reason.
        rows: token ids.
    """
    if not rows:
        return "no row has two tokens or more"
    highest = max(max(row) for row in rows)
    for model, name in zip(models, names, strict=True):
        if model.config.is_encoder_decoder:
            return f"{name} is an encoder-decoder model, which needs a text for each of its parts"
        if highest >= vocabulary(model):
            return (
                f"the rows have the token {highest}, and {name} has an embedding of "
                f"{vocabulary(model)} tokens"
            )
    return None


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[Batch]:
    """Batches of rows of the same length, longest first.

    Args:
        rows: token ids.
        size: the most rows of a batch.
    """
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for _, group in groupby(order, key=lambda number: len(rows[number])):
        alike = list(group)
        for begin in range(0, len(alike), size):
            numbers = tuple(alike[begin : begin + size])
            yield Batch(numbers, tuple(tuple(rows[number]) for number in numbers))


def run(model: PreTrainedModel, batch: Batch, **options: bool) -> Any:
    """The outputs of a model for a batch, without a cache of keys and values.

    Args:
        model: a loaded model; or a part of it, to leave out its head.
        batch: the rows.
        options: what else the model shall return, such as `output_hidden_states`.
    """
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return model(**batch.tensors(model), **options)


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that makes hidden states: the scores of a vocabulary take much memory.

    Args:
        model: a loaded model.
    """
    return cast("PreTrainedModel", model.base_model)


@contextmanager
def undisturbed(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Run models without dropout and gradients, and leave them as they were.

    Args:
        models: loaded models.
    """
    import torch

    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def exact(values: torch.Tensor) -> torch.Tensor:
    """Values in float64, on the CPU where their device has no float64.

    Args:
        values: a tensor of floats.
    """
    import torch

    return (values.cpu() if values.device.type == "mps" else values).to(torch.float64)


def choose_layers(layers: int | Sequence[int] | None, numbers: Sequence[int]) -> list[int]:
    """The places in `numbers` of the layers that were asked for.

    Args:
        layers: how many of the last layers, the numbers of some, or None for all.
        numbers: the numbers of all layers.

    Raises:
        OptionError: if a number is none of them.
    """
    from diffxfer.errors import OptionError

    if layers is None:
        return list(range(len(numbers)))
    if isinstance(layers, int):
        if layers < 1:
            raise OptionError("layers", f"expected a count of at least 1, found {layers}")
        return list(range(len(numbers)))[-layers:]
    unknown = sorted(set(layers) - set(numbers))
    if unknown or not layers:
        problem = f"expected numbers of layers among {list(numbers)}, found {list(layers)}"
        raise OptionError("layers", problem)
    return [place for place, number in enumerate(numbers) if number in layers]
