"""Telling which tensors have rows that belong to tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.diffs.matching.names import is_known_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.header import TensorSpec


def vocabulary_tensors(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> frozenset[str]:
    """The names of the tensors whose rows belong to tokens.

    Those with a known name, and matrices whose first dimension is the vocabulary's size; the
    latter only where that size cannot be mistaken for another dimension of the model.

    Args:
        tensors: a role's tensors.
        config: its config.json.
    """
    known = {name for name, spec in tensors.items() if is_known_vocabulary(name) and spec.shape}
    size = vocabulary_size(config)
    others = [spec for name, spec in tensors.items() if name not in known]
    if size is None or size in _other_dimensions(config) or any(_is_inner(s, size) for s in others):
        return frozenset(known)
    by_size = {spec.name for spec in others if len(spec.shape) > 1 and spec.shape[0] == size}
    return frozenset(known | by_size)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The vocabulary's size by the config, that of its text model where it is nested."""
    for part in _parts(config):
        size = part.get("vocab_size")
        if type(size) is int:
            return size
    return None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    nested = config.get("text_config")
    return [config, nested] if isinstance(nested, dict) else [config]


def _is_inner(spec: TensorSpec, size: int) -> bool:
    """Whether a tensor has that size where no vocabulary's can be: as a norm's, or an input's."""
    return size in (spec.shape[1:] if len(spec.shape) > 1 else spec.shape)


def _other_dimensions(config: Mapping[str, Any]) -> set[int]:
    """Sizes that a projection's output may have."""
    found: set[int] = set()
    for part in _parts(config):
        numbers = {key: n for key, n in part.items() if type(n) is int and key != "vocab_size"}
        heads, width = numbers.get("num_attention_heads", 0), numbers.get("hidden_size", 0)
        head = numbers.get("head_dim") or (width // heads if heads else 0)
        found |= {numbers.get(key, 0) for key in ("hidden_size", "intermediate_size")}
        found |= {head * heads, head * numbers.get("num_key_value_heads", 0)}
        found.add(2 * numbers.get("intermediate_size", 0))
    return found - {0}
