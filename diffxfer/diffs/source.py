"""Where a graft's Δ comes from: two checkpoints, or a diff vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import read_config
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.manifest import FileEntry, Manifest, SourceEntry, require_diff
from diffxfer.diffs.match import BaseMatch, Difference, Side, match_base
from diffxfer.diffs.names import is_embedding
from diffxfer.diffs.ties import HeadState, find_head, with_head, without_tied_head
from diffxfer.diffs.tokens import read_tokenizer
from diffxfer.diffs.vocabulary import Vocabulary, relate_to_base
from diffxfer.diffs.vocabulary_tensors import vocabulary_tensors
from diffxfer.errors import ArtifactError
from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.header import ShardFile
    from diffxfer.checkpoints.reader import Checkpoint, Weights
    from diffxfer.diffs.selection import Selection

COMPANIONS = "companions"
"""The folder of a diff vector that holds finetuned's companions."""

HEAD = "lm_head.weight"
"""What a head is called that is on no disk."""


@dataclass(frozen=True, slots=True)
class Source:
    """Δ, before it is computed or read.

    Attributes:
        operation: how an output tensor is made from it.
        match: the differences, and what else there was in finetuned and base.
        heads: what finetuned and base have for an output head.
        vocabulary: what is known of its tokens.
        behaviour: the folder of finetuned's companions.
        shards: every file of it.
        entries: the inputs by role, for the manifest.
    """

    operation: Operation
    match: BaseMatch
    heads: Mapping[str, HeadState]
    vocabulary: Vocabulary
    behaviour: Path
    shards: tuple[ShardFile, ...]
    entries: Mapping[str, SourceEntry]

    def head_difference(self) -> Difference | None:
        """What serves as the head's Δ where finetuned and base tie it: the embedding's."""
        if set(self.heads.values()) != {HeadState.TIED}:
            return None
        found = (d for d in self.match.differences if is_embedding(d.name))
        embedding = next(found, None)
        return embedding and Difference(HEAD, embedding.sources, embedding.vocabulary)


def from_checkpoints(
    finetuned: Checkpoint,
    base: Checkpoint,
    selection: Selection,
    label: Callable[[str], str],
    vocab: str,
) -> Source:
    """Δ as finetuned − base.

    Args:
        finetuned: one checkpoint.
        base: the other.
        selection: what the user chose.
        label: the name that the selection knows a tensor by.
        vocab: how rows of tokens pair: ``"auto"``, ``"ids"`` or ``"tokens"``.

    Raises:
        DiffxferError: if their names or tokens cannot be paired.
    """
    heads = {c.role: find_head(c.tensors, c.config) for c in (finetuned, base)}
    own = any(head.state is HeadState.OWN for head in heads.values())
    head_name = heads["finetuned"].name or heads["base"].name or HEAD

    def side(checkpoint: Checkpoint) -> Side:
        head = heads[checkpoint.role]
        if own:
            tensors = with_head(checkpoint.tensors, head, head_name)
        else:
            tensors = without_tied_head(checkpoint.tensors, head)
        return Side(checkpoint.role, tensors, vocabulary_tensors(tensors, checkpoint.config))

    match = match_base(side(finetuned), side(base), selection, label)
    vocabulary = relate_to_base(
        read_tokenizer(finetuned.folder),
        read_tokenizer(base.folder),
        vocab,
        same_rows=all(d.sources[0].shape == d.sources[1].shape for d in match.differences),
    )
    return Source(
        Operation.TRANSFER,
        match,
        {role: head.state for role, head in heads.items()},
        vocabulary,
        finetuned.folder,
        (*finetuned.weights.shards, *base.weights.shards),
        {c.role: source_entry(c.weights) for c in (finetuned, base)},
    )


def from_diff(folder: Path) -> Source:
    """Δ as a diff vector has it.

    Args:
        folder: the diff vector.

    Raises:
        DiffxferError: if it is not one, or not whole.
    """
    manifest = require_diff(folder)
    weights = open_weights(folder)
    _refuse_incomplete(folder, manifest, weights)
    behaviour = folder / COMPANIONS
    names = vocabulary_tensors(weights.tensors, read_config(behaviour))
    match = BaseMatch(
        [Difference(name, (spec,), name in names) for name, spec in weights.tensors.items()],
        left_out=[*manifest.left_out, *manifest.kept],
    )
    return Source(
        Operation.APPLY,
        match,
        {role: HeadState(state) for role, state in (manifest.tied or {}).items()},
        _stored_vocabulary(folder, behaviour, manifest),
        behaviour,
        weights.shards,
        {"diff vector": source_entry(weights)},
    )


def _refuse_incomplete(folder: Path, manifest: Manifest, weights: Weights) -> None:
    described, found = manifest.tensors.keys(), weights.tensors.keys()
    if described != found:
        odd = min(described ^ found)
        where = "its shards do not have" if odd in described else "its manifest does not name"
        raise ArtifactError(folder, f"is damaged: {where} {odd!r}", "make or download it again")
    for shard in weights.shards:
        entry = manifest.shards.get(shard.path.name)
        if entry is None or (entry.size, entry.xxh3) != (shard.size, shard.header_hash):
            raise ArtifactError(
                shard.path, "is not the shard that the manifest names", "make or download it again"
            )


def _stored_vocabulary(folder: Path, behaviour: Path, manifest: Manifest) -> Vocabulary:
    tokenizer = read_tokenizer(behaviour)
    tokens = manifest.tokens
    if tokens is None:
        return Vocabulary(None, {}, {}, None, "")
    # Where only base had a tokenizer, finetuned was taken to have the same, and none is stored.
    if tokenizer is not None and tokenizer.fingerprint != tokens.finetuned:
        raise ArtifactError(
            folder,
            f"has another tokenizer in {COMPANIONS}/ than it was extracted with",
            "make or download it again",
        )
    return Vocabulary(tokenizer, tokens.added, tokens.renamed, None, tokens.base)


def source_entry(weights: Weights) -> SourceEntry:
    """What a manifest says of an input."""
    shards = {
        shard.path.name: FileEntry(size=shard.size, xxh3=shard.header_hash)
        for shard in weights.shards
    }
    return SourceEntry(name=weights.folder.resolve().name, shards=shards)
