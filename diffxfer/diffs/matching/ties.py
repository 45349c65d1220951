"""Output heads that are tied to the embedding, on disk or by being left out.

A tied model has one tensor for both. Where the target ties them, so must the graft, and finetuned
and base must have had nothing else to say about the head; where it does not, the embedding of a
tied finetuned or base serves as its head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.reader import same_bytes
from diffxfer.diffs.matching.names import is_embedding, is_head
from diffxfer.errors import MatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.header import TensorSpec

_WORDS = re.compile(r"For(?:CausalLM|ConditionalGeneration)|LMHead")


class HeadState(Enum):
    """What a role has for an output head."""

    OWN = "own"
    """A tensor of its own."""
    TIED = "tied"
    """The embedding: no tensor on disk, or a copy."""
    ABSENT = "absent"
    """None at all: a bare encoder or embedding model, or names that we do not know."""


@dataclass(frozen=True, slots=True)
class Head:
    """A role's output head.

    Attributes:
        state: what it is.
        name: its name on disk, if it is there.
        embedding: the embedding's name, if there is one.
    """

    state: HeadState
    name: str | None
    embedding: str | None


def find_head(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Head:
    """Find out whether a role ties its head; reads data only where both tensors could be equal.

    Args:
        tensors: the role's tensors.
        config: its config.json.
    """
    name = next(filter(is_head, tensors), None)
    embedding = next(filter(is_embedding, tensors), None)
    if embedding is None:
        return Head(HeadState.ABSENT if name is None else HeadState.OWN, name, None)
    if name is None:
        untied = _says_untied(config)
        return Head(HeadState.ABSENT if untied else HeadState.TIED, None, embedding)
    equal = same_bytes(tensors[name], tensors[embedding])
    return Head(HeadState.TIED if equal else HeadState.OWN, name, embedding)


def _says_untied(config: Mapping[str, Any]) -> bool:
    """Whether the config says that a head which is not on disk is not the embedding either.

    Either outright, or because the architecture is a bare model, which has no head.
    """
    nested = [config.get(key) for key in ("text_config", "llm_config", "language_config")]
    texts = [config, *(part for part in nested if isinstance(part, dict))]
    architectures = config.get("architectures")
    bare = isinstance(architectures, list) and any(
        isinstance(name, str) and name.endswith("Model") for name in architectures
    )
    return bare or any(text.get("tie_word_embeddings") is False for text in texts)


def has_head_for_words(config: Mapping[str, Any]) -> bool:
    """Whether the config names a class that has an output head for words, on disk or tied.

    Args:
        config: a role's config.json.
    """
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    return any(isinstance(name, str) and _WORDS.search(name) for name in names)


def without_tied_head(tensors: Mapping[str, TensorSpec], head: Head) -> dict[str, TensorSpec]:
    """The tensors of a role, less a head that is a copy of its embedding."""
    if head.state is not HeadState.TIED or head.name is None:
        return dict(tensors)
    return {name: spec for name, spec in tensors.items() if name != head.name}


def with_head(tensors: Mapping[str, TensorSpec], head: Head, name: str) -> dict[str, TensorSpec]:
    """The tensors of a role, its embedding serving as head where it is tied.

    Args:
        tensors: the role's tensors.
        head: what it has.
        name: what to call a head that is not on disk.
    """
    if head.state is HeadState.TIED and head.embedding is not None and head.name is None:
        return {**tensors, name: tensors[head.embedding]}
    return dict(tensors)


def refuse_own_head(role: str, head_name: str) -> MatchError:
    """What to raise where the target ties its head and another role does not."""
    return MatchError(
        (),
        f"{head_name} differs from the embedding in {role}, and the target has one tensor for both",
        "give --exclude 'lm_head' to leave that head's change out, or use an untied target",
    )
