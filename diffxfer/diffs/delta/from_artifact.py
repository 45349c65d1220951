"""Δ from a diff vector on disk, and quick checks that the diff vector is undamaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import companion_path, read_bytes, read_config
from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.artifact.samples import SAMPLES_NAME
from diffxfer.diffs.artifact.weights import diff_weights
from diffxfer.diffs.delta.from_checkpoints import COMPANIONS, HEAD, Source, is_shared, source_entry
from diffxfer.diffs.matching.buffers import is_buffer
from diffxfer.diffs.matching.match import BaseMatch, Difference
from diffxfer.diffs.matching.names import is_embedding
from diffxfer.diffs.matching.ties import HeadState, has_head_for_words
from diffxfer.diffs.soundness.idle import stored_tokenizer_in_use
from diffxfer.diffs.vocab.relate import Vocabulary
from diffxfer.diffs.vocab.tensors import vocabulary_tensors
from diffxfer.errors import ArtifactError
from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.resolve import Place
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.checkpoints.weights import Weights
    from diffxfer.diffs.artifact.manifest import Manifest


def from_diff(place: Place, manifest: Manifest) -> Source:
    """Δ as a diff vector stores it.

    Args:
        place: the diff vector.
        manifest: its manifest.

    Raises:
        DiffxferError: if the diff vector is incomplete or damaged.
    """
    folder = place.folder
    weights = open_weights(place)
    refuse_incomplete(folder, manifest, weights, [n for n in manifest.files if _is_read(n)])
    weights = diff_weights(weights, manifest)
    behaviour = folder / COMPANIONS
    tensors, buffers = _differences(weights, manifest)
    config = read_config(behaviour)
    names = vocabulary_tensors(tensors, config)
    added = [weights.tensors[name] for name in manifest.added_tensors]
    match = BaseMatch(
        [Difference(name, (spec,), name in names) for name, spec in tensors.items()],
        kept=list(manifest.kept),
        left_out=dict.fromkeys(manifest.left_out, 0),
        added=added,
        is_part=bool(manifest.is_part),
        excuses_heads=bool(added) or manifest.command.get("added") == "drop",
        keeps_words=has_head_for_words(config),
    )
    heads = {role: HeadState(state) for role, state in (manifest.tied or {}).items()}
    embedding = next((d for d in match.differences if is_embedding(d.name)), None)
    shared = embedding if is_shared(heads) else None
    return Source(
        Operation.APPLY,
        match,
        heads,
        shared and Difference(HEAD, shared.sources, shared.vocabulary),
        _stored_vocabulary(folder, tensors, manifest),
        behaviour,
        weights.shards,
        {"diff vector": source_entry(weights, manifest.sources)},
        buffers,
        {name: entry.checksum for name, entry in manifest.tensors.items()},
    )


def _differences(
    weights: Weights, manifest: Manifest
) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """The differences of weights in a diff vector, and the element counts of its buffers.

    Older versions of diffxfer stored differences of buffers too.
    """
    added = frozenset(manifest.added_tensors)
    found = {name: spec for name, spec in weights.tensors.items() if name not in added}
    refuse_integers(found)
    buffers = {name: spec.elements for name, spec in found.items() if is_buffer(name, spec)}
    return {name: spec for name, spec in found.items() if name not in buffers}, buffers


def _is_read(name: str) -> bool:
    """Whether a graft reads a file of the diff vector; the other files are written anew."""
    return name.startswith(f"{COMPANIONS}/") or name == SAMPLES_NAME


def refuse_integers(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a diff vector with integer tensors, which cannot be differences.

    Args:
        tensors: Δ.

    Raises:
        ArtifactError: for the first one.
    """
    for name, spec in tensors.items():
        if spec.dtype not in FLOATS:
            problem = f"tensor {short(name)} is {spec.dtype}, expected a float dtype"
            raise ArtifactError(spec.shard.path, problem, "make or download it again")


def refuse_incomplete(
    folder: Path, manifest: Manifest, weights: Weights, files: Iterable[str]
) -> None:
    """Refuse a folder of ours that differs from its manifest, without reading tensor data.

    Args:
        folder: the folder.
        manifest: its manifest.
        weights: its shards, from their headers.
        files: names of files in the manifest, besides shards, to check too.

    Raises:
        ArtifactError: if a shard's size or header, or one of those files, differs.
        CompanionError: if a file is a link that must not be followed.
    """
    described, found = manifest.tensors.keys(), weights.tensors.keys()
    unknown = next((name for name in manifest.added_tensors if name not in described), None)
    if unknown is not None:
        problem = f"is damaged: its manifest has no entry for {short(unknown)}"
        raise ArtifactError(folder, problem, "make or download it again")
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
            raise ArtifactError(path, problem, "make or download the diff vector again")


def _stored_vocabulary(
    folder: Path, tensors: Mapping[str, StoredTensor], manifest: Manifest
) -> Vocabulary:
    tokenizer, idle, left_out = stored_tokenizer_in_use(folder / COMPANIONS, tensors)
    tokens = manifest.tokens
    if tokens is None:
        return Vocabulary(None, {}, {}, None, "")
    # No tokenizer is stored if only base had one; finetuned was assumed to have the same.
    if tokenizer is not None and tokenizer.fingerprint != tokens.finetuned:
        raise ArtifactError(
            folder,
            f"has a tokenizer in {COMPANIONS}/ that was changed after it was extracted",
            "make or download it again",
        )
    # Older diff vectors list tokens without a row as added.
    added = {i: token for i, token in tokens.added.items() if i not in idle}
    return Vocabulary(tokenizer, added, tokens.renamed, None, tokens.base, left_out)
