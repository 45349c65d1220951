"""How many tokens a model in memory can read."""

from __future__ import annotations

from typing import Any

NO_LIMIT = 1 << 30
"""More tokens than any model reads; tokenizers without a maximum have a larger number."""


def longest_input(model: Any, tokenizer: Any, at_most: int | None = None) -> int | None:
    """The maximum number of tokens of an input, special tokens included.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        at_most: a lower maximum, if there is one.

    Returns:
        The smallest of the maximum of the tokenizer, the positions of the model and `at_most`;
        None if there is none of these.
    """
    known = [tokenizer.model_max_length, at_most]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its relatives count positions from the one after that of padding.
        first = (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        )
        known.append(positions - next(first, 0))
    return min((int(one) for one in known if one and one < NO_LIMIT), default=None)
