"""The check that the outputs of a teacher can be compared with those of the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.text_config import config_parts
from diffxfer.diffs.vocab.pair_base import differing_ids, is_harmless, token_at
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import VocabularyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.reader import Checkpoint


def check_teacher(
    student: Checkpoint, teacher: Checkpoint, *, hidden: bool, words: bool = True
) -> None:
    """Check that the logits of a teacher, and its hidden states, match those of the student.

    Reserved tokens that neither uses may have different names, as in Llama 3.0 and 3.1.

    Args:
        student: the model to train.
        teacher: the model to learn from.
        hidden: whether their hidden states are compared as well.
        words: whether their logits are those of tokens, not of labels.

    Raises:
        VocabularyError: if the tokens or the sizes differ.
    """
    keys = {"vocab_size": "logits per token"} if words else {}
    if hidden:
        keys |= {"hidden_size": "numbers per hidden state", "num_hidden_layers": "layers"}
    for key, what in keys.items():
        ours, theirs = _setting(student.config, key), _setting(teacher.config, key)
        if ours != theirs:
            remedy = "give a teacher of the same vocabulary"
            if key != "vocab_size":
                remedy = "omit --hidden-weight, or give a teacher of the same shape"
            problem = f"has {theirs} {what}, but the model to train has {ours}"
            raise VocabularyError(teacher.folder, problem, remedy)
    tokenizers = read_tokenizer(teacher.folder), read_tokenizer(student.folder)
    theirs_first = tokenizers, tokenizers[::-1]
    for one, other in theirs_first:
        if one is None or other is None:
            continue  # without tokenizers, only the number of logits can be compared
        for i in differing_ids(one, other):
            if not is_harmless(i, one, other):
                taught, own = (token_at(t, i) if t else None for t in tokenizers)
                problem = (
                    f"has {_told(taught)} with id {i}, but the model to train has {_told(own)}"
                )
                remedy = "give a teacher of the same vocabulary"
                raise VocabularyError(teacher.folder, problem, remedy)


def _told(token: str | None) -> str:
    return "no token" if token is None else f"the token {token!r}"


def _setting(config: Mapping[str, Any], key: str) -> object:
    """A setting of the language model, at the top of its config or nested."""
    return next((part[key] for part in config_parts(config) if key in part), None)


def context_length(config: Mapping[str, Any]) -> int | None:
    """The context length of a model in tokens; None if its config does not say.

    Args:
        config: the content of its config.json.
    """
    found = _setting(config, "max_position_embeddings") or _setting(config, "n_positions")
    return found if isinstance(found, int) and not isinstance(found, bool) else None
