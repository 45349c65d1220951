"""Whether a folder is a diff vector, for those who need one and for those who need a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diffxfer.checkpoints.hub.repo_ids import place_name
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.resolve import require_folder
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.diffs.artifact.manifest import Manifest


def require_diff(folder: Path) -> Manifest:
    """The manifest of a diff vector.

    Raises:
        CheckpointError: if there is no such folder.
        ArtifactError: if the folder is not a diff vector.
    """
    require_folder(folder, "a diff vector")
    manifest = read_manifest(folder)
    if manifest is None:
        found = (
            "a model"
            if os.path.lexists(folder / "config.json")
            else f"a folder without {MANIFEST_NAME}"
        )
        raise ArtifactError(
            place_name(folder),
            f"is {found}, expected a diff vector",
            "make one with: diffxfer extract FINETUNED BASE -o DIFF",
        )
    if manifest.kind != "diff":
        what = {"graft": "a graft", "adapter": "an adapter"}.get(
            manifest.kind, f"a {manifest.kind} model"
        )
        raise ArtifactError(
            place_name(folder),
            f"is {what}, expected a diff vector",
            "make one with: diffxfer extract FINETUNED BASE -o DIFF",
        )
    return manifest


def refuse_diff(folder: Path, role: str) -> None:
    """Refuse a diff vector where a model is expected.

    Raises:
        CheckpointError: if there is no such folder.
        ArtifactError: if the folder is a diff vector.
    """
    require_folder(folder, f"the {role} checkpoint")
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind == "diff":
        raise ArtifactError(
            place_name(folder),
            f"is a diff vector, expected the {role} model",
            "give a model here; a diff vector is the first argument of diffxfer apply",
        )
