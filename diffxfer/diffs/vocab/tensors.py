"""Recognising the tensors whose rows belong to tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.text_config import config_parts
from diffxfer.diffs.matching.names import is_in_block, is_known_vocabulary
from diffxfer.diffs.vocab.token_files import MAX_TOKENS
from diffxfer.errors import VocabularyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.stored import StoredTensor

MAX_ROWS = 2 * MAX_TOKENS
"""More than any known embedding has, with padding; rows are paired in memory."""


def vocabulary_tensors(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> frozenset[str]:
    """The names of the tensors whose rows belong to tokens: the first of `sort_tensors`."""
    return sort_tensors(tensors, config)[0]


def sort_tensors(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[frozenset[str], frozenset[str]]:
    """Find the tensors whose rows belong to tokens, and those whose rows may belong to tokens.

    A tensor's rows belong to tokens if it has a known name, or if its first dimension is the
    vocabulary's size. The size counts only outside of numbered blocks, where projections may have
    any size, and only if no other dimension of the model has that size.

    Args:
        tensors: a role's tensors.
        config: its config.json.

    Returns:
        The names of tensors whose rows belong to tokens, and the names of ambiguous tensors: those
        of the vocabulary's size that are not among the first.

    Raises:
        VocabularyError: a tensor has more rows than any vocabulary.
    """
    found = _sort_by_size(tensors, config)
    for name in (*found[0], *found[1]):
        spec = tensors[name]
        if spec.shape[0] > MAX_ROWS:
            problem = f"tensor {short(name)} has {spec.shape[0]} rows, more than any vocabulary"
            raise VocabularyError(spec.shard.path, problem, "download or save it again")
    return found


def _sort_by_size(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[frozenset[str], frozenset[str]]:
    # Ignore tensors without elements: a header may state any number of rows for them.
    tensors = {name: spec for name, spec in tensors.items() if spec.elements}
    known = {name for name, spec in tensors.items() if is_known_vocabulary(name) and spec.shape}
    size = vocabulary_size(config)
    if size is None:
        return frozenset(known), frozenset()
    others = {name: spec for name, spec in tensors.items() if name not in known}
    outside = {name: spec.shape for name, spec in others.items() if not is_in_block(name)}
    # BART has a bias of shape (1, size), where tokens are columns.
    lying = {name for name, shape in outside.items() if shape == (1, size)}
    by_size = {name for name, shape in outside.items() if shape[:1] == (size,)}
    inner = (name for name, spec in others.items() if _is_inner(spec, size))
    if size in _other_dimensions(config) or any(
        name not in lying and not (name in by_size and len(outside[name]) == 1) for name in inner
    ):
        return frozenset(known), frozenset(by_size | lying)
    return frozenset(known | by_size), frozenset(lying - by_size)


def refuse_ambiguous(name: str, *, added: bool) -> None:
    """Refuse an ambiguous tensor if tokens do not keep their positions.

    Args:
        name: the tensor.
        added: whether tokens are added, so that no pairing mode keeps positions.

    Raises:
        VocabularyError: always.
    """
    leave = f"leave it out with --exclude '{re.escape(name)}$'"
    raise VocabularyError(
        name,
        "has as many rows as the vocabulary: they may belong to tokens, whose ids differ between "
        "the roles, or be another dimension of the model",
        leave if added else f"{leave}, or give --vocab ids to pair all rows by position",
    )


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The vocabulary's size from the config, or from its nested text config."""
    for part in config_parts(config):
        size = part.get("vocab_size")
        if type(size) is int:
            return size
    return None


def _is_inner(spec: StoredTensor, size: int) -> bool:
    """Whether the size is that of a vector, or of a dimension after the first."""
    return size in (spec.shape[1:] if len(spec.shape) > 1 else spec.shape)


def _other_dimensions(config: Mapping[str, Any]) -> set[int]:
    """Sizes that a projection's output may have."""
    found: set[int] = set()
    for part in config_parts(config):
        numbers = {key: n for key, n in part.items() if type(n) is int and key != "vocab_size"}
        heads, width = numbers.get("num_attention_heads", 0), numbers.get("hidden_size", 0)
        head = numbers.get("head_dim") or (width // heads if heads else 0)
        found |= {
            numbers.get(key, 0) for key in ("hidden_size", "n_embd", "d_model", "intermediate_size")
        }
        found |= {head * heads, head * numbers.get("num_key_value_heads", 0)}
        found.add(2 * numbers.get("intermediate_size", 0))
    return found - {0}
