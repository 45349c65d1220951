"""Leaving out idle tokens: those in finetuned's tokenizer without a row and without a use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.beside import Beside
from diffxfer.diffs.soundness.model import find_embedding, read_model
from diffxfer.diffs.soundness.token_rows import idle_tokens, is_placeholder
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.soundness.model import Model, Shaped
    from diffxfer.diffs.vocab.tokens import Tokenizer


def tokenizers_in_use(
    finetuned: Checkpoint, base: Checkpoint
) -> tuple[Tokenizer | None, Tokenizer | None, tuple[str, ...]]:
    """The tokenizers of both roles; finetuned's without idle tokens.

    A token that has a row in base is kept: its missing row in finetuned is reported as an error.

    Args:
        finetuned: the fine-tuned checkpoint.
        base: its base.

    Returns:
        Finetuned's tokenizer and base's, None if there is none; and a line that names the tokens
        left out, except those that base's tokenizer has too, which are common in their family.

    Raises:
        CompanionError: a tokenizer file is unsafe or malformed.
    """
    model = read_model(Beside(finetuned.folder), finetuned.tensors)
    theirs = read_tokenizer(base.folder)
    table = theirs or model.tokenizer
    if table is None or not (idle := idle_tokens(model)):
        return model.tokenizer, theirs, ()
    embedding = find_embedding(base.tensors, base.config)
    rows = 0 if embedding is None else embedding.rows
    ids = table.ids()
    left = [i for i in idle if ids.get(model.token(i) or "", rows) >= rows]
    new = [model.token(i) or "" for i in left if theirs is None or model.token(i) not in ids]
    return _without(model, left), theirs, _said(model, new)


def stored_tokenizer_in_use(
    companions: Path, tensors: Mapping[str, Shaped]
) -> tuple[Tokenizer | None, frozenset[int], tuple[str, ...]]:
    """The tokenizer of a diff vector without idle tokens, as in `tokenizers_in_use`.

    Args:
        companions: finetuned's companions, in the diff vector.
        tensors: the differences.

    Returns:
        Its tokenizer, the ids that are left out of it, and a line that names them.

    Raises:
        CompanionError: a file is unsafe or malformed.
    """
    model = read_model(Beside(companions), tensors)
    idle = frozenset(idle_tokens(model))
    # Base's tokenizer is not known here, so assume that base has the placeholders too.
    new = [token for i in sorted(idle) if not is_placeholder(token := model.token(i) or "")]
    return _without(model, idle), idle, _said(model, new)


def _without(model: Model, left: Iterable[int]) -> Tokenizer | None:
    """A tokenizer without these tokens; its fingerprint stays that of its files."""
    tokenizer, gone = model.tokenizer, {*left}
    if tokenizer is None or not gone:
        return tokenizer
    tokens = [None if i in gone else token for i, token in enumerate(tokenizer.tokens)]
    while tokens[-1] is None:  # the last one must not be a hole
        tokens.pop()
    return replace(tokenizer, tokens=tuple(tokens), special=tokenizer.special - gone)


def _said(model: Model, tokens: list[str]) -> tuple[str, ...]:
    if not tokens:
        return ()
    return (
        "tokens of finetuned's tokenizer that have no row in its embedding "
        f"({model.rows}) and that nothing uses are left out: {listed(tokens)}",
    )
