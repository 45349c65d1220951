"""Tensor names: pairing names that differ in a prefix, and recognising kinds of tensor."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.wrappers import without_modules
from diffxfer.errors import MatchError

if TYPE_CHECKING:
    from collections.abc import Collection

# A model is stored as `model.layers…`; inside a multimodal model as `language_model.model.layers…`
# or `model.language_model.layers…`; and without its head as `layers…`.
_CONTAINERS = re.compile(r"^(?:(?:model|language_model|transformer)\.)+")
_NUMBER = re.compile(r"\d+")
_NUMBERED = re.compile(r"(?:^|\.)\d+(?:\.|\Z)")

_EMBEDDINGS = (
    *("embed_tokens", "wte", "embed_tokens_per_layer"),
    *("word_embeddings", "tok_embeddings", "embed_in"),
)
_HEADS = ("lm_head", "embed_out", r"shared_head\.head")
_VOCABULARY_ENDS = tuple(
    f"{module.rpartition('.')[2]}.{leaf}"
    for module in (*_EMBEDDINGS, *_HEADS, "shared")
    for leaf in ("weight", "bias")
)
_VOCABULARY = re.compile(
    rf"(?:^|\.)(?:{'|'.join((*_EMBEDDINGS, *_HEADS))})\.(?:weight|bias)$"
    # The embedding that the encoder and decoder of T5 and BART share.
    r"|^(?:model\.)?shared\.weight$"
)
# The heads that models of transformers and their fine-tunes have; any name may end in `_head`.
_HEAD_SEGMENT = re.compile(
    r"(?:^|\.)(?:(?:\w+_)?heads?|cls|pooler|classifier|score|qa_outputs|embed_out|lm_loss|predictions"
    r"|\w+_predictions|vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier"
    r"|seq_relationship|final_logits_bias)(?:\.|$)"
)


def canonical(name: str) -> str:
    """A name without the prefixes and wrappers that differ between ways to store a model."""
    return _CONTAINERS.sub("", without_modules(name))


def is_in_block(name: str) -> bool:
    """Whether the name has a number, as in a numbered layer, and so has similar siblings."""
    return _NUMBERED.search(name) is not None


def pattern(name: str) -> str:
    """A name with every number replaced by ``*``: the same for all layers and experts."""
    return _NUMBER.sub("*", name)


def is_head(name: str) -> bool:
    """Whether this is the output head that a model may tie to its embedding."""
    name = without_modules(name)
    return name.endswith("lm_head.weight") and canonical(name) == "lm_head.weight"


def is_head_name(name: str) -> bool:
    """Whether a name is that of a task head or of the language-model head."""
    return _HEAD_SEGMENT.search(name) is not None


def is_embedding(name: str) -> bool:
    """Whether this is the embedding that a model may tie its output head to."""
    known = ("embed_tokens.weight", "wte.weight")
    name = without_modules(name)
    return name.endswith(known) and canonical(name) in known


def is_layer_embedding(name: str) -> bool:
    """Whether this is the embedding that Gemma 3n's layers share."""
    return without_modules(name).endswith("embed_tokens_per_layer.weight")


def is_known_vocabulary(name: str) -> bool:
    """Whether the name says that the rows belong to tokens."""
    # The ending decides for most names, far faster than a pattern does.
    if "module." in name:
        name = without_modules(name)
    return name.endswith(_VOCABULARY_ENDS) and _VOCABULARY.search(name) is not None


def pair_names(
    reference: Collection[str], other: Collection[str], roles: tuple[str, str]
) -> dict[str, str]:
    """Pair the names of two roles: equal names first, then names that differ in their prefix.

    Args:
        reference: names of the first role.
        other: names of the second role.
        roles: the two roles, for messages.

    Returns:
        A name of `other` for each name of `reference` that has one.

    Raises:
        MatchError: if names are ambiguous without their prefix.
    """
    pairs = {name: name for name in reference if name in other}
    if len(pairs) in (len(reference), len(other)):
        return pairs
    ours = _by_canonical([name for name in reference if name not in pairs], reference, roles[0])
    theirs = _by_canonical([name for name in other if name not in pairs], other, roles[1])
    pairs.update((name, theirs[key]) for key, name in ours.items() if key in theirs)
    return pairs


def _by_canonical(names: Collection[str], every: Collection[str], role: str) -> dict[str, str]:
    found = {canonical(name): name for name in names}
    counts = Counter(canonical(name) for name in every)
    for key, name in found.items():
        if counts[key] > 1:
            same = ", ".join(sorted(other for other in every if canonical(other) == key)[:3])
            raise MatchError(
                (),
                f"{name} in {role} cannot be paired by name: without their prefixes, {same} are all"
                f" named {key}",
                "save all roles with the same prefixes",
            )
    return found
