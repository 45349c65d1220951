"""Rows of text as a model is given them: token ids, and the tokens whose loss counts.

Rows for causal language models are tokenized and masked exactly as `tune` does, with TRL's
SFTTrainer: what a probe measures is the loss that training minimises.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MASKED_SHARE = 0.15
"""The share of tokens that a masked language model has to predict, as in BERT."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row of tokens.

    Attributes:
        ids: tokens of the row as the model is given them.
        scored: ``scored[i]`` says whether the loss of predicting token ``i`` counts; never at 0 for
            a causal language model.
        label: for classifiers, the number of the right label.
        targets: for masked language models, the tokens before masking.
        types: for pairs of texts, the segment of each token, if the tokenizer gives it.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    label: int | None = None
    targets: tuple[int, ...] | None = None
    types: tuple[int, ...] | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first scored one; all tokens if none is scored."""
        first = self.scored.index(True) if any(self.scored) else len(self.ids)
        return self.ids[:first]


def causal_rows(
    columns: Mapping[str, Sequence[Any]], tokenizer: Any, *, max_length: int
) -> Iterator[TokenRow]:
    """Tokenize rows for a causal language model, as `tune` does.

    A text counts as a whole, and its end token with it; of a prompt and its completion, only the
    completion and its end token count; messages count as a whole, as the chat template formats
    them. A text or messages longer than `max_length` are cut into windows, each of which begins
    with the last token of the one before, so that every token counts once. A completion that goes
    beyond `max_length` is truncated, and dropped if no token is left that counts.

    Args:
        columns: `messages`, `prompt` and `completion`, or `text`, with the values of all rows.
        tokenizer: of transformers, with an end token, and a chat template if there are messages.
        max_length: the maximum number of tokens of a row, at least 2.

    Yields:
        The rows in their order.
    """
    assert max_length >= 2, max_length
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        if "prompt" in row:
            prompt, whole = _prompt_and_whole(row["prompt"], row["completion"], tokenizer)
            pairs = zip(prompt, whole, strict=False)  # as TRL: tokens may merge at the boundary
            start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            ids = whole[:max_length]
            scored = tuple(place >= max(start, 1) for place in range(len(ids)))
            if any(scored):
                yield TokenRow(tuple(ids), scored)
            continue
        ids = _whole(row, tokenizer)
        for begin in range(0, len(ids) - 1, max_length - 1):
            window = tuple(ids[begin : begin + max_length])
            yield TokenRow(window, (False, *(True for _ in window[1:])))


def _prompt_and_whole(prompt: Any, completion: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str):
        whole = prompt + _ended(completion, tokenizer)
        return _ids(tokenizer, prompt), _ids(tokenizer, whole)
    asked = _format(tokenizer, prompt, add_generation_prompt=True)
    return asked, _format(tokenizer, [*prompt, *completion])


def _whole(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if "text" in row:
        return _ids(tokenizer, _ended(row["text"], tokenizer))
    return _format(tokenizer, row["messages"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    # It would warn of a text longer than the context, which is cut later.
    ids: list[int] = tokenizer(text=text, verbose=False)["input_ids"]
    return ids


def _ended(text: str, tokenizer: Any) -> str:
    end: str = tokenizer.eos_token
    return text if text.endswith(end) else text + end


def _format(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> list[int]:
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    ids: list[int] = found["input_ids"]
    return ids


def masked_rows(
    texts: Sequence[str], tokenizer: Any, *, max_length: int, seed: int
) -> Iterator[TokenRow]:
    """Tokenize texts for a masked language model, and mask 15 % of the tokens of each.

    Which tokens are masked follows from the seed and the row alone, so it is the same for all
    models of one tokenizer. Each is replaced by the mask token. A text longer than `max_length` is
    cut into windows, each with the special tokens around it.

    Args:
        texts: the texts.
        tokenizer: of transformers, with a mask token.
        max_length: the maximum number of tokens of a row, special tokens included.
        seed: of the choice of masked tokens.

    Yields:
        The rows in their order, without those that have no token to mask.
    """
    import numpy as np

    for number, text in enumerate(texts):
        for part, (ids, first, last) in enumerate(_windows(text, tokenizer, max_length)):
            if last <= first:
                continue
            generator = np.random.default_rng([seed, number, part])
            count = max(1, round(MASKED_SHARE * (last - first)))
            chosen = generator.choice(np.arange(first, last), count, replace=False)
            hidden = frozenset(chosen.tolist())
            scored = tuple(place in hidden for place in range(len(ids)))
            mask: int = tokenizer.mask_token_id
            given = (mask if covered else i for i, covered in zip(ids, scored, strict=True))
            yield TokenRow(tuple(given), scored, targets=ids)


def _windows(text: str, tokenizer: Any, length: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Windows of a text with the special tokens around them, and where the text is in each."""
    around = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    around |= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    plain = _ids(tokenizer, text)
    head = list(takewhile(around.__contains__, plain))
    plain = plain[len(head) :]
    tail = list(takewhile(around.__contains__, reversed(plain)))[::-1]
    plain = plain[: len(plain) - len(tail)]
    step = max(1, length - len(head) - len(tail))
    for begin in range(0, len(plain), step):
        part = plain[begin : begin + step]
        yield (*head, *part, *tail), len(head), len(head) + len(part)


def labelled_rows(
    columns: Mapping[str, Sequence[Any]],
    labels: Sequence[int],
    tokenizer: Any,
    *,
    max_length: int,
) -> Iterator[TokenRow]:
    """Tokenize texts, or pairs of texts, for a classifier; longer ones are truncated.

    Args:
        columns: `text`, or `text` and `text_pair`, with the values of all rows.
        labels: the number of the label of each row.
        tokenizer: of transformers.
        max_length: the maximum number of tokens of a row.

    Yields:
        The rows in their order.
    """
    pairs = columns.get("text_pair")
    for number, (text, label) in enumerate(zip(columns["text"], labels, strict=True)):
        pair = pairs[number] if pairs is not None else None
        found = tokenizer(text=text, text_pair=pair, truncation=True, max_length=max_length)
        ids = tuple(found["input_ids"])
        types = found.get("token_type_ids")
        yield TokenRow(
            ids, (False,) * len(ids), label, types=tuple(types) if types and any(types) else None
        )
