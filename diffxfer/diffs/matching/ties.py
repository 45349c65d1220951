"""Output heads tied to the embedding, stored as a copy of it or not stored.

A tied model has one tensor for both. If the target ties its head, the graft must tie it too, so
finetuned and base must not have a separate head. If the target does not, the embedding of a tied
finetuned or base serves as its head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.files import same_values
from diffxfer.checkpoints.text_config import config_parts
from diffxfer.diffs.matching.names import is_embedding, is_head
from diffxfer.errors import MatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.stored import StoredTensor

_WORDS = re.compile(r"For(?:CausalLM|ConditionalGeneration)|LMHead")


class HeadState(Enum):
    """The kind of output head that a role has."""

    OWN = "own"
    """A separate tensor."""
    TIED = "tied"
    """The embedding serves as head: no head is stored, or a copy of the embedding."""
    ABSENT = "absent"
    """No head: a bare encoder or embedding model, or names that are not recognised."""


@dataclass(frozen=True, slots=True)
class Head:
    """A role's output head.

    Attributes:
        state: its kind.
        name: its name on disk, if it is stored.
        embedding: the embedding's name, if there is one.
    """

    state: HeadState
    name: str | None
    embedding: str | None


def find_head(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Head:
    """Find a role's head and whether it is tied; reads data only to compare head and embedding.

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
    equal = same_values(tensors[name], tensors[embedding])
    return Head(HeadState.TIED if equal else HeadState.OWN, name, embedding)


def _says_untied(config: Mapping[str, Any]) -> bool:
    """Whether the config says that a head that is not stored is not tied either.

    It says so explicitly, or its architecture is a bare model, which has no head.
    """
    architectures = config.get("architectures")
    bare = isinstance(architectures, list) and any(
        isinstance(name, str) and name.endswith("Model") for name in architectures
    )
    return bare or any(text.get("tie_word_embeddings") is False for text in config_parts(config))


def has_head_for_words(config: Mapping[str, Any]) -> bool:
    """Whether the config names a class with a language-model head, stored or tied.

    Args:
        config: a role's config.json.
    """
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    return any(isinstance(name, str) and _WORDS.search(name) for name in names)


def without_tied_head(tensors: Mapping[str, StoredTensor], head: Head) -> dict[str, StoredTensor]:
    """The tensors of a role, without a head that is a copy of its embedding."""
    if head.state is not HeadState.TIED or head.name is None:
        return dict(tensors)
    return {name: spec for name, spec in tensors.items() if name != head.name}


def with_head(
    tensors: Mapping[str, StoredTensor], head: Head, name: str
) -> dict[str, StoredTensor]:
    """The tensors of a role; if its head is tied, the embedding is added as the head.

    Args:
        tensors: the role's tensors.
        head: the role's head.
        name: the name for a head that is not stored.
    """
    if head.state is HeadState.TIED and head.embedding is not None and head.name is None:
        return {**tensors, name: tensors[head.embedding]}
    return dict(tensors)


def refuse_own_head(role: str, head_name: str) -> MatchError:
    """The error for a role with a separate head while the target ties its head."""
    return MatchError(
        (),
        f"{head_name} differs from the embedding in {role}, but the target has one tensor for both",
        f"give --exclude '{head_name.removesuffix('.weight')}' to leave out that head's change, or"
        " use an untied target",
    )
