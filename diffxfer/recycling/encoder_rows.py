"""Rows of encoders as tokens: a text or a pair of texts, with the tokenizer's special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets

from diffxfer.errors import DataError, OptionError
from diffxfer.recycling.objectives import MLM
from diffxfer.recycling.training_report import Truncation

if TYPE_CHECKING:
    from collections.abc import Collection

    from diffxfer.recycling.labels import Labels
    from diffxfer.recycling.training_data import TrainingRows

ROW = "row"
"""The key of a row's position in the file, which seeds its masks."""
SPECIAL = "special_tokens_mask"


def tokenize_rows(
    rows: TrainingRows,
    labels: Labels | None,
    tokenizer: Any,
    *,
    length: int,
    inputs: Collection[str],
) -> tuple[datasets.Dataset, Truncation]:
    """Tokenize the rows of a classifier or a masked language model.

    Args:
        rows: the training rows.
        labels: those of the rows; None for a masked language model.
        tokenizer: of transformers.
        length: the maximum number of tokens of a row, special tokens included.
        inputs: the inputs that the model takes.

    Returns:
        The tokens, and how many rows were truncated or have no token to predict.

    Raises:
        DataError: if no row has a token to predict.
        OptionError: if `length` leaves no room for a token beside the special ones.
    """
    texts = [rows.columns[key] for key in ("text", "text_pair") if key in rows.columns]
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
    if length < special + len(texts):
        problem = f"{length} leaves no room for text beside {special} special tokens"
        raise OptionError("--max-length", problem, f"give {special + len(texts)} or more")
    found: dict[str, list[Any]] = {}
    shortened = dropped = 0
    for number, parts in enumerate(zip(*texts, strict=True)):
        known = tokenizer(*parts, return_special_tokens_mask=True, verbose=False)
        if len(known["input_ids"]) > length:
            shortened += 1
            known = tokenizer(
                *parts, return_special_tokens_mask=True, truncation=True, max_length=length
            )
        if labels is None and all(known[SPECIAL]):
            dropped += 1
            continue
        row = {key: values for key, values in known.items() if key in inputs}
        row |= {SPECIAL: known[SPECIAL], ROW: number} if labels is None else {}
        row |= {} if labels is None else {"labels": labels.rows[number]}
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    if not found:
        problem = f"no row has a token to predict within {length} tokens"
        raise DataError(rows.name, problem, f"give longer texts for --objective {MLM}")
    return datasets.Dataset.from_dict(found), Truncation(length, shortened, dropped)
