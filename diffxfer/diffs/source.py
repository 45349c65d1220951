"""Where a graft's Δ comes from: two checkpoints, or a diff vector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import companion_path, read_bytes, read_config
from diffxfer.checkpoints.header import FLOATS, short
from diffxfer.checkpoints.hub.names import cached_id
from diffxfer.checkpoints.reader import open_checkpoint, open_weights
from diffxfer.checkpoints.source import Place, find
from diffxfer.diffs.artifact.license import read_license
from diffxfer.diffs.artifact.manifest import Manifest, ShardEntry, SourceEntry, refuse_diff
from diffxfer.diffs.artifact.samples import SAMPLES_NAME
from diffxfer.diffs.matching.match import BaseMatch, Difference, Side, match_base
from diffxfer.diffs.matching.names import is_embedding
from diffxfer.diffs.matching.selection import Selection
from diffxfer.diffs.matching.ties import HeadState, find_head, with_head, without_tied_head
from diffxfer.diffs.soundness.idle import stored_tokenizer_in_use, tokenizers_in_use
from diffxfer.diffs.vocab.relate import Vocabulary, relate_to_base
from diffxfer.diffs.vocab.tensors import refuse_ambiguous, sort_tensors, vocabulary_tensors
from diffxfer.errors import ArtifactError
from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.header import ShardFile, TensorSpec
    from diffxfer.checkpoints.reader import Checkpoint, Weights
    from diffxfer.diffs.matching.ties import Head

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
        shared_head: what serves as the head's Δ where both tie it: the embedding's.
        vocabulary: what is known of its tokens.
        behaviour: the folder of finetuned's companions.
        shards: every file of it.
        entries: the inputs by role, for the manifest.
    """

    operation: Operation
    match: BaseMatch
    heads: Mapping[str, HeadState]
    shared_head: Difference | None
    vocabulary: Vocabulary
    behaviour: Path
    shards: tuple[ShardFile, ...]
    entries: Mapping[str, SourceEntry]

    def left_out(self, head: HeadState) -> dict[str, int]:
        """What the user left out of finetuned, with the head that only its embedding gives.

        Args:
            head: what the target has for one.
        """
        found = self.match.left_out
        lost = _is_shared(self.heads) and self.shared_head is None
        if head is HeadState.OWN and lost and any(map(is_embedding, found)):
            return found | {HEAD: 0}
        return found


def open_roles(named: Mapping[str, Path | str]) -> dict[str, Checkpoint]:
    """Find and open the models of each role, in folders or on the Hub, and read no weights.

    Args:
        named: what the user named, by role.

    Raises:
        DiffxferError: if one is no sound checkpoint, or a diff vector.
    """
    places = {role: find(name, f"the {role} checkpoint") for role, name in named.items()}
    for role, place in places.items():
        refuse_diff(place.folder, role)
    return {role: open_checkpoint(place, role) for role, place in places.items()}


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
        return Side(checkpoint.role, tensors, *sort_tensors(tensors, checkpoint.config))

    sides = side(finetuned), side(base)
    match = match_base(*sides, selection, label)
    ours, theirs, left_out = tokenizers_in_use(finetuned, base)
    vocabulary = relate_to_base(
        ours,
        theirs,
        vocab,
        same_rows=all(d.sources[0].shape == d.sources[1].shape for d in match.differences),
        rows=_rows_gained(match),
    )
    if vocabulary.base_pairing and not vocabulary.base_pairing.in_place:
        ambiguous = sides[0].ambiguous | sides[1].ambiguous
        for difference in match.differences:
            if not difference.vocabulary and any(s.name in ambiguous for s in difference.sources):
                refuse_ambiguous(difference.name, added=False)
    return Source(
        Operation.TRANSFER,
        match,
        {role: head.state for role, head in heads.items()},
        _shared_head(finetuned, base, heads),
        replace(vocabulary, warnings=(*left_out, *vocabulary.warnings)),
        finetuned.folder,
        (*finetuned.weights.shards, *base.weights.shards),
        {c.role: source_entry(c.weights) for c in (finetuned, base)},
    )


def _rows_gained(match: BaseMatch) -> tuple[int, int] | None:
    """Finetuned's rows and base's, where finetuned was resized to have more tokens."""
    rows = [
        (d.sources[0].shape[0], d.sources[1].shape[0]) for d in match.differences if d.vocabulary
    ]
    grown = [(ours, theirs) for ours, theirs in rows if ours > theirs]
    return (max(n for n, _ in grown), min(n for _, n in grown)) if grown else None


def _is_shared(heads: Mapping[str, HeadState]) -> bool:
    """Whether neither finetuned nor base has a head beside its embedding."""
    return set(heads.values()) == {HeadState.TIED}


def _shared_head(
    finetuned: Checkpoint, base: Checkpoint, heads: Mapping[str, Head]
) -> Difference | None:
    """The embedding's difference as the head's, whether or not the user left the embedding out."""
    if not _is_shared({role: head.state for role, head in heads.items()}):
        return None

    def side(checkpoint: Checkpoint) -> Side:
        embedding = checkpoint.tensors[heads[checkpoint.role].embedding or ""]
        return Side(checkpoint.role, {HEAD: embedding}, frozenset({HEAD}))

    match = match_base(side(finetuned), side(base), Selection(), str)
    return next(iter(match.differences), None)


def from_diff(place: Place, manifest: Manifest) -> Source:
    """Δ as a diff vector has it.

    Args:
        place: the diff vector.
        manifest: what it says of itself.

    Raises:
        DiffxferError: if it is not whole.
    """
    folder = place.folder
    weights = open_weights(place)
    refuse_incomplete(folder, manifest, weights, [n for n in manifest.files if _is_read(n)])
    behaviour = folder / COMPANIONS
    refuse_integers(weights.tensors)
    names = vocabulary_tensors(weights.tensors, read_config(behaviour))
    match = BaseMatch(
        [Difference(name, (spec,), name in names) for name, spec in weights.tensors.items()],
        kept=list(manifest.kept),
        left_out=dict.fromkeys(manifest.left_out, 0),
    )
    heads = {role: HeadState(state) for role, state in (manifest.tied or {}).items()}
    embedding = next((d for d in match.differences if is_embedding(d.name)), None)
    shared = embedding if _is_shared(heads) else None
    return Source(
        Operation.APPLY,
        match,
        heads,
        shared and Difference(HEAD, shared.sources, shared.vocabulary),
        _stored_vocabulary(folder, weights.tensors, manifest),
        behaviour,
        weights.shards,
        {"diff vector": source_entry(weights, manifest.sources)},
    )


def _is_read(name: str) -> bool:
    """Whether a file of a diff vector has a part in what is made of it; the rest is made anew."""
    return name.startswith(f"{COMPANIONS}/") or name == SAMPLES_NAME


def refuse_integers(tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse a diff vector with tensors that are no differences.

    Args:
        tensors: Δ.

    Raises:
        ArtifactError: for the first one.
    """
    for name, spec in tensors.items():
        if spec.dtype not in FLOATS:
            problem = f"tensor {short(name)} is {spec.dtype}, which no difference is"
            raise ArtifactError(spec.shard.path, problem, "make or download it again")


def refuse_incomplete(
    folder: Path, manifest: Manifest, weights: Weights, files: Iterable[str]
) -> None:
    """Refuse a folder of ours that is not as its manifest has it, as far as that is quickly told.

    Args:
        folder: what is to be used.
        manifest: what it says of itself.
        weights: its shards, by their headers; no data is read.
        files: names of the manifest's files beside them that must be as they were written.

    Raises:
        ArtifactError: if a shard's size or header, or one of those files, is another.
        CompanionError: if a file must not be followed.
    """
    described, found = manifest.tensors.keys(), weights.tensors.keys()
    if described != found:
        odd = min(described ^ found)
        where = "its shards do not have" if odd in described else "its manifest does not name"
        raise ArtifactError(folder, f"is damaged: {where} {odd!r}", "make or download it again")
    for shard in weights.shards:
        known = manifest.shards.get(shard.path.name)
        if known is None or (known.size, known.header_xxh3) != (shard.size, shard.header_hash):
            raise ArtifactError(
                shard.path, "is not the shard that the manifest names", "make or download it again"
            )
    for name in files:
        path = companion_path(folder, name)
        if path is None:
            raise ArtifactError(folder / name, "is missing", "make or download it again")
        if xxhash.xxh3_128_hexdigest(read_bytes(path)) != manifest.files[name].xxh3:
            problem = "is not the file that the manifest names"
            raise ArtifactError(path, problem, "make or download it all again")


def _stored_vocabulary(
    folder: Path, tensors: Mapping[str, TensorSpec], manifest: Manifest
) -> Vocabulary:
    tokenizer, idle, left_out = stored_tokenizer_in_use(folder / COMPANIONS, tensors)
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
    # Older diff vectors list tokens as added that have no row.
    added = {i: token for i, token in tokens.added.items() if i not in idle}
    return Vocabulary(tokenizer, added, tokens.renamed, None, tokens.base, left_out)


def source_entry(
    weights: Weights, made_from: Mapping[str, SourceEntry] | None = None
) -> SourceEntry:
    """What a manifest says of an input.

    Args:
        weights: the input.
        made_from: for a diff vector, its own inputs.
    """
    shards = {
        shard.path.name: ShardEntry(size=shard.size, header_xxh3=shard.header_hash)
        for shard in weights.shards
    }
    stated = read_license(weights.folder)
    inner = dict(made_from or {})
    hub = cached_id(weights.folder)
    if hub is not None:
        name, revision = hub.repo, hub.revision
    else:
        # A name may hold bytes that are no UTF-8, which a manifest cannot.
        name = weights.folder.resolve().name.encode("utf-8", "backslashreplace").decode()
        revision = None
    return SourceEntry(name=name, revision=revision, shards=shards, license=stated, made_from=inner)
