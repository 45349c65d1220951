"""Whether one model can teach another: they must mean the same by every place of their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.diffs.vocab.pair_base import differing_ids, is_harmless, token_at
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import VocabularyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.reader import Checkpoint

_NESTED = ("text_config", "llm_config", "language_config")


def check_teacher(student: Checkpoint, teacher: Checkpoint, *, hidden: bool) -> None:
    """Refuse a teacher whose outputs cannot be compared with the student's, place by place.

    Reserved tokens that neither uses may have other names, as between Llama 3.0 and 3.1.

    Args:
        student: the model that is trained.
        teacher: the model that it learns from.
        hidden: whether their hidden states are compared too.

    Raises:
        VocabularyError: if they have other tokens, or as many as cannot be compared.
    """
    keys = {"vocab_size": "logits a token"}
    if hidden:
        keys |= {"hidden_size": "numbers a hidden state", "num_hidden_layers": "layers"}
    for key, what in keys.items():
        ours, theirs = _setting(student.config, key), _setting(teacher.config, key)
        if ours != theirs:
            remedy = "give a teacher of the same vocabulary"
            if key != "vocab_size":
                remedy = "leave --hidden-weight out, or give a teacher of the same shape"
            problem = f"has {theirs} {what}, and the model that it is to teach has {ours}"
            raise VocabularyError(teacher.folder, problem, remedy)
    tokenizers = read_tokenizer(teacher.folder), read_tokenizer(student.folder)
    theirs_first = tokenizers, tokenizers[::-1]
    for one, other in theirs_first:
        if one is None or other is None:
            continue  # the same number of logits is all that can be known
        for i in differing_ids(one, other):
            if not is_harmless(i, one, other):
                taught, own = (token_at(t, i) if t else None for t in tokenizers)
                problem = f"has the token {taught!r} with id {i}, and the model has {own!r}"
                remedy = "give a teacher of the same vocabulary"
                raise VocabularyError(teacher.folder, problem, remedy)


def _setting(config: Mapping[str, Any], key: str) -> object:
    """A setting of a model's text part, wherever its config has it."""
    nested = [config.get(name) for name in _NESTED]
    parts = [config, *(part for part in nested if isinstance(part, dict))]
    return next((part[key] for part in parts if key in part), None)


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model can read at once, if its config says so.

    Args:
        config: its config.json.
    """
    found = _setting(config, "max_position_embeddings") or _setting(config, "n_positions")
    return found if isinstance(found, int) and not isinstance(found, bool) else None
