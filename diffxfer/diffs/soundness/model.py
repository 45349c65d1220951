"""A model as its files describe it, before any weights are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from diffxfer.checkpoints.text_config import config_parts
from diffxfer.diffs.matching.names import is_in_block, is_known_vocabulary, is_layer_embedding
from diffxfer.diffs.vocab.tensors import vocabulary_size
from diffxfer.diffs.vocab.tokens import read_templates, read_tokenizer, table_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.checkpoints.beside import Beside
    from diffxfer.diffs.vocab.tokens import Tokenizer

_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|head)\.(?:weight|bias)$")
_LIKE_AN_EMBEDDING = re.compile(r"emb|wte|tok")
# Idefics stores the rows of its image tokens in a second tensor.
_MORE_ROWS = re.compile(r"(?:^|\.)embed_tokens\.additional_embedding\.weight$")


class Shaped(Protocol):
    """A tensor with a known shape: on disk, or yet to be written."""

    @property
    def dtype(self) -> str:
        """As safetensors names it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """One size a dimension."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The input embedding of a model's tokens.

    Attributes:
        name: the tensor's name.
        rows: its number of rows, one per token.
        width: its second dimension.
    """

    name: str
    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class Owners:
    """The roles that a remedy names, as possessives.

    Attributes:
        embedding: the owner of the embedding.
        behaviour: the owner of templates and generation settings.
    """

    embedding: str = "the"
    behaviour: str = "the"

    def place(self, file: str) -> str:
        """Where to change a file that belongs to the behaviour."""
        return "there" if self.behaviour == "the" else f"in {self.behaviour} {file}"


@dataclass(frozen=True, slots=True)
class Model:
    """A model as its files describe it.

    Attributes:
        files: its companions.
        tensors: its tensors by name; for a diff vector, those that have a difference.
        config: its ``config.json``.
        text: the part of the config that describes the language model.
        tokenizer: its tokenizer, if it has one.
        table: the name of the file that lists the vocabulary; empty without a tokenizer.
        templates: its chat templates: the file of each, and its text.
        embedding: its input embedding; None if no tensor is recognised as one.
        owners: the roles that a remedy names.
    """

    files: Beside
    tensors: Mapping[str, Shaped]
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    tokenizer: Tokenizer | None
    table: str
    templates: tuple[tuple[str, str], ...]
    embedding: Embedding | None
    owners: Owners = Owners()

    @property
    def rows(self) -> str:
        """The embedding's rows, for a message."""
        assert self.embedding is not None
        return f"{self.embedding.name} has {self.embedding.rows:,} rows"

    def token(self, token_id: int) -> str | None:
        """The token with an id, None if there is none."""
        tokens = () if self.tokenizer is None else self.tokenizer.tokens
        return tokens[token_id] if 0 <= token_id < len(tokens) else None


def read_model(files: Beside, tensors: Mapping[str, Shaped], owners: Owners | None = None) -> Model:
    """Read the files that describe a model.

    Args:
        files: its companions.
        tensors: its tensors by name.
        owners: the roles that a remedy names.

    Raises:
        CompanionError: a file is unsafe or malformed.
    """
    config = files.document("config.json")
    found = table_file(files)
    return Model(
        files,
        tensors,
        config,
        text_config(config),
        read_tokenizer(files),
        "" if found is None else found[0],
        tuple(read_templates(files)),
        find_embedding(tensors, config),
        owners or Owners(),
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: a nested config, or all of it."""
    return next(iter(config_parts(config)[1:]), config)


def find_embedding(tensors: Mapping[str, Shaped], config: Mapping[str, Any]) -> Embedding | None:
    """The input embedding, by its name; if there are several, the one with the most rows.

    Encoder and decoder, or the parts of a speech model, have one each. An id without a row in the
    largest has no row in any of them.

    Args:
        tensors: the model's tensors.
        config: its ``config.json``.
    """
    # Ignore tensors without elements: a header may state any number of rows for them.
    flat = {
        n: spec.shape for n, spec in tensors.items() if len(spec.shape) == 2 and all(spec.shape)
    }
    known = {n: shape for n, shape in flat.items() if is_known_vocabulary(n) and not is_head(n)}
    # Gemma 3n's per-layer embedding has less padding.
    found = {n: shape for n, shape in known.items() if not is_layer_embedding(n)} or known
    if not found:
        size = vocabulary_size(config)
        found = {
            name: shape
            for name, shape in flat.items()
            if shape[0] == size and _LIKE_AN_EMBEDDING.search(name) and not is_in_block(name)
        }
    if not found:
        return None
    name = max(found, key=lambda n: found[n][0])
    more = sum(shape[0] for n, shape in flat.items() if _MORE_ROWS.search(n))
    return Embedding(name, found[name][0] + more, found[name][1])


def is_head(name: str) -> bool:
    """Whether a tensor is an output head, as opposed to an input embedding."""
    return _HEAD.search(name) is not None


def numbers(document: Any, suffix: str) -> Iterator[int]:
    """Every integer under a key with a suffix, at any depth of objects.

    Args:
        document: a JSON document.
        suffix: the end of the key.
    """
    if not isinstance(document, dict):
        return
    for key, value in document.items():
        if type(value) is int and key.endswith(suffix):
            yield value
        yield from numbers(value, suffix)
