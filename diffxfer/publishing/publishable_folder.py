"""The check that a folder may be published: diffxfer wrote it, and it matches its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.companions import README, companion_path, read_bytes, read_config
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.resolve import require_folder
from diffxfer.diffs.artifact.manifest import Manifest, read_manifest
from diffxfer.diffs.delta.from_artifact import refuse_incomplete
from diffxfer.diffs.delta.from_checkpoints import COMPANIONS
from diffxfer.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class PublishableFolder:
    """A folder that was checked.

    Attributes:
        manifest: its manifest.
        config: its config; for a diff vector, that of finetuned.
        files: the files to publish, by name, without the card and the manifest.
        edited_card: the card, if it was edited after diffxfer wrote it.
    """

    manifest: Manifest
    config: dict[str, Any]
    files: dict[str, Path]
    edited_card: bytes | None


def open_publishable_folder(folder: Path) -> PublishableFolder:
    """Check a folder, without reading its weights.

    Args:
        folder: the folder to publish.

    Raises:
        DiffxferError: if diffxfer did not write it, or it does not match its manifest.
    """
    require_folder(folder, "a folder that diffxfer wrote")
    manifest = read_manifest(folder)
    if manifest is None:
        problem = f"has no {MANIFEST_NAME}: diffxfer did not write it"
        raise ArtifactError(folder, problem, "hf upload publishes any folder")
    if manifest.kind == "adapter":
        problem = "is an adapter, and push publishes diff vectors and models"
        raise ArtifactError(folder, problem, f"hf upload ORG/NAME {folder.name} publishes it")
    names = [name for name in manifest.files if name != README]
    for name in (*names, *manifest.shards):
        if any(part.startswith(".") for part in name.split("/")) or name == MANIFEST_NAME:
            problem = f"names {name!r}, which diffxfer never writes"
            raise ArtifactError(folder / MANIFEST_NAME, problem, "make or download it again")
    weights = open_weights(folder)
    refuse_incomplete(folder, manifest, weights, names)
    found = {shard.path.name for shard in weights.shards}
    lost = sorted(manifest.shards.keys() - found)
    if lost:
        raise ArtifactError(folder / lost[0], "is missing", "make or download it again")
    readme = companion_path(folder, README)
    card = None if readme is None else read_bytes(readme)
    written = manifest.files.get(README)
    edited = card is not None and (
        written is None or xxhash.xxh3_128_hexdigest(card) != written.xxh3
    )
    home = folder / COMPANIONS if manifest.kind == "diff" else folder
    files = {name: folder / name for name in (*sorted(manifest.shards), *sorted(names))}
    return PublishableFolder(manifest, read_config(home), files, card if edited else None)
