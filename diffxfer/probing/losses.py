"""The loss of a model on each row: of a causal or masked language model, or of a classifier."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from diffxfer.probing.rows import TokenRow

BATCH_SIZE = 16
"""The default number of rows that a model is given at once."""
_LOGITS_AT_ONCE = 1 << 23
"""Logits that are made float64 at once, 64 MiB."""


class RowLosses(NamedTuple):
    """The loss of each row.

    Attributes:
        sums: the sum of −log p over the scored tokens of a row, in nats, shape `(rows,)`; for a
            classifier, −log p of the right label.
        counts: the number of scored tokens, shape `(rows,)`; for a classifier, 1.
        right: how many of these had the largest logit, shape `(rows,)`.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    right: NDArray[np.int64]


def row_losses(
    model: Any,
    rows: Sequence[TokenRow],
    *,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
) -> RowLosses:
    """Compute the loss of a model on each row.

    Rows of similar length share a batch, padded on the right. Logits are made float32 and the loss
    is computed from them in float64.

    Args:
        model: of transformers, in evaluation mode, on that device; it predicts what the rows ask
            for, the next token, the masked token or the label.
        rows: at least one row, each with a scored token or a label.
        batch_size: the maximum number of rows in a batch.
        device: where the model is.

    Returns:
        The losses, in the order of the rows.
    """
    import numpy as np
    import torch

    sums = np.zeros(len(rows))
    counts = np.zeros(len(rows), np.int64)
    right = np.zeros(len(rows), np.int64)
    if rows[0].label is not None and model.config.get_text_config().pad_token_id is None:
        batch_size = 1  # a decoder finds the last token of a padded row by its padding token
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            batch = [rows[place] for place in places]
            owners, losses, hits = _batch_losses(model, batch, torch.device(device))
            owned = np.asarray(places)[owners]
            np.add.at(sums, owned, losses)
            np.add.at(counts, owned, 1)
            np.add.at(right, owned, hits)
    return RowLosses(sums, counts, right)


def _batch_losses(
    model: Any, batch: Sequence[TokenRow], device: torch.device
) -> tuple[Any, Any, Any]:
    """Of each prediction: its row in the batch, its loss, and whether it is right."""
    import torch

    given = {name: value.to(device) for name, value in _inputs(model, batch).items()}
    if batch[0].label is not None:
        logits = model(**given).logits
        owners = torch.arange(len(batch))
        targets = torch.tensor([row.label for row in batch])
    else:
        ahead = 0 if batch[0].targets is not None else 1  # a causal model predicts the next token
        owners, places = torch.tensor(
            [
                (owner, place - ahead)
                for owner, row in enumerate(batch)
                for place, scored in enumerate(row.scored)
                if scored
            ]
        ).T
        wanted = [(row.targets or row.ids, row.scored) for row in batch]
        targets = torch.tensor(
            [i for ids, scored in wanted for i, due in zip(ids, scored, strict=True) if due]
        )
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            kept, places = places.unique(return_inverse=True)
            given["logits_to_keep"] = kept.to(device)
        logits = model(**given).logits[owners.to(device), places.to(device)]
    losses, hits = _cross_entropy(logits, targets.to(device))
    return owners.numpy(), losses.cpu().numpy(), hits.cpu().numpy()


def _inputs(model: Any, batch: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    import torch

    padding = model.config.get_text_config().pad_token_id or 0
    length = max(len(row.ids) for row in batch)

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*each, *[filler] * (length - len(each))] for each in values])

    given = {
        "input_ids": padded([row.ids for row in batch], padding),
        "attention_mask": padded([[1] * len(row.ids) for row in batch], 0),
    }
    if any(row.types for row in batch):
        segments = [row.types or (0,) * len(row.ids) for row in batch]
        given["token_type_ids"] = padded(segments, 0)
    return given


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log p of the targets, in float64, and whether they have the largest logit."""
    import torch

    step = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    losses, hits = [], []
    for some, due in zip(torch.split(logits, step), torch.split(targets, step), strict=True):
        exact = some.float().double()
        chosen = exact.gather(-1, due[:, None])[:, 0]
        losses.append(exact.logsumexp(-1) - chosen)
        hits.append(some.argmax(-1) == due)
    return torch.cat(losses), torch.cat(hits)
