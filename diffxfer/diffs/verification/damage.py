"""Finding damage in a folder that diffxfer wrote: files, shards and tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import companion_path, optional_object, read_bytes
from diffxfer.checkpoints.header import parse_header
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.reader import read_shard
from diffxfer.checkpoints.shard_index import names_like
from diffxfer.diffs.artifact.kind import require_diff
from diffxfer.diffs.artifact.manifest import is_sealed, read_manifest
from diffxfer.errors import ArtifactError, CheckpointError, Damage, listed
from diffxfer.streaming import checksum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.resolve import Place
    from diffxfer.checkpoints.stored import TensorSpec
    from diffxfer.diffs.artifact.manifest import Manifest

_NOT_OURS = frozenset({".gitattributes", ".gitignore"})
_FOLDERS_NOT_OURS = frozenset({".cache", ".git"})
"""Files and folders that the Hub and its client create."""


@dataclass(slots=True)
class Survey:
    """The content of a folder, before its tensor data is read.

    Attributes:
        tensors: the tensors that the manifest names and whose data is present.
        damage: the damage found.
    """

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    damage: list[Damage] = field(default_factory=list)


def our_manifest(folder: Path, *, restoring: bool) -> Manifest:
    """The manifest of a folder that can be verified.

    Args:
        folder: the folder.
        restoring: whether it must be a diff vector.

    Raises:
        ArtifactError: if it has none, or one whose checksums this version does not make.
    """
    manifest = require_diff(folder) if restoring else read_manifest(folder)
    if manifest is None:
        raise ArtifactError(
            folder,
            f"has no {MANIFEST_NAME}, and without its checksums nothing can be verified",
            "give a folder that diffxfer extract, apply, transfer or tune made",
        )
    if manifest.checksum != checksum.NAME:
        raise ArtifactError(
            folder / MANIFEST_NAME,
            f"has checksums of the kind {manifest.checksum!r}, but this version of diffxfer makes"
            f" {checksum.NAME}",
            "update diffxfer: pipx upgrade diffxfer",
        )
    return manifest


def survey_folder(place: Place, manifest: Manifest) -> Survey:
    """Compare a folder with its manifest, except for the tensors' data.

    Args:
        place: the folder, written by diffxfer.
        manifest: its manifest.

    Raises:
        CompanionError: if the manifest cannot be read.
        HubError: if a header cannot be fetched from the Hub.
    """
    survey, folder = Survey(), place.folder
    if not is_sealed(read_bytes(folder / MANIFEST_NAME)):
        problem = "was changed after it was written, so nothing in it can be trusted"
        survey.damage.append(Damage(MANIFEST_NAME, "", problem))
    survey.damage += _check_files(folder, manifest)
    _check_shards(place, manifest, survey)
    survey.damage += _find_surplus(folder, manifest)
    return survey


def _check_files(folder: Path, manifest: Manifest) -> list[Damage]:
    damage = []
    for name, entry in manifest.files.items():
        try:
            path = companion_path(folder, name)
            data = b"" if path is None else read_bytes(path)
        except CheckpointError as exc:
            damage.append(Damage(name, "", exc.problem))
            continue
        if path is None:
            damage.append(Damage(name, "", "is missing"))
        elif len(data) != entry.size:
            damage.append(Damage(name, "", _other_size(len(data), entry.size)))
        elif xxhash.xxh3_128_hexdigest(data) != entry.xxh3:
            damage.append(Damage(name, "", "was changed: its checksum differs"))
    return damage


def _other_size(found: int, expected: int) -> str:
    what = "is truncated: it has" if found < expected else "has"
    return f"{what} {found:,} bytes, expected {expected:,}"


def _check_shards(place: Place, manifest: Manifest, survey: Survey) -> None:
    homes = _homes(place.folder, names_like(manifest.shards).index)
    missing = dict.fromkeys(manifest.tensors)
    unread: list[str] = []
    for name, entry in manifest.shards.items():
        # A name with a slash would lead out of the folder.
        found = _read(place, name) if Path(name).name == name else "is not the name of a shard"
        if isinstance(found, str):
            unread.append(name)
            survey.damage.append(Damage(name, "", found))
            continue
        size = next(iter(found.values())).shard.size if found else entry.size
        header = next(iter(found.values())).shard.header_hash if found else entry.header_xxh3
        if header != entry.header_xxh3:
            survey.damage.append(Damage(name, "", _other_header(header, manifest)))
        elif size != entry.size:
            survey.damage.append(Damage(name, "", _other_size(size, entry.size)))
        for tensor, spec in found.items():
            missing.pop(tensor, None)
            problem = _placed(tensor, spec, manifest, survey)
            if problem is None:
                survey.tensors[tensor] = spec
            else:
                survey.damage.append(Damage(name, tensor, problem))
    for tensor in missing:
        home = homes.get(tensor, unread[0] if len(unread) == 1 else "")
        survey.damage.append(Damage(home, tensor, "is missing"))


def _read(place: Place, name: str) -> dict[str, TensorSpec] | str:
    """The header of a shard, or the reason why it cannot be read."""
    if not place.has(name):
        return "is missing"
    file = place.files[name] if place.files is not None else None
    try:
        if file is not None and not file.here:
            from diffxfer.checkpoints.hub.headers import fetch_headers

            return parse_header(fetch_headers([file])[name], file, whole=False)
        return read_shard(place.folder / name, whole=False)
    except CheckpointError as exc:
        return exc.problem


def _homes(folder: Path, index: str) -> Mapping[str, str]:
    """The shard of each tensor by the index; empty if the index is missing or unreadable."""
    try:
        placed = optional_object(folder, index).get("weight_map")
    except CheckpointError:
        return {}  # already reported as a damaged file
    if not isinstance(placed, dict):
        return {}
    return {tensor: shard for tensor, shard in placed.items() if isinstance(shard, str)}


def _other_header(header: str, manifest: Manifest) -> str:
    same = [name for name, entry in manifest.shards.items() if entry.header_xxh3 == header]
    if same:
        return f"is another shard: it has the header of {listed(same)}"
    return "has another header than the one written"


def _placed(tensor: str, spec: TensorSpec, manifest: Manifest, survey: Survey) -> str | None:
    """The reason why a tensor of a shard cannot be checked, or None."""
    if tensor not in manifest.tensors:
        return "is not in the manifest"
    if tensor in survey.tensors:
        return "occurs twice"
    end = spec.start + spec.nbytes
    if end > spec.shard.size:
        return f"is truncated: it ends at byte {end:,}, but the shard has {spec.shard.size:,}"
    return None


def _find_surplus(folder: Path, manifest: Manifest) -> list[Damage]:
    named = {MANIFEST_NAME, *manifest.shards, *manifest.files, *_NOT_OURS}
    damage: list[Damage] = []

    def unlisted(exc: OSError) -> None:
        path = Path(exc.filename).relative_to(folder).as_posix()
        damage.append(Damage(path, "", f"cannot be listed ({exc.strerror})"))

    for parent, folders, names in os.walk(folder, onerror=unlisted):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in _FOLDERS_NOT_OURS]
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted((*names, *linked)):
            path = Path(parent, name).relative_to(folder).as_posix()
            if path not in named:
                damage.append(Damage(path, "", "is not in the manifest"))
    return damage
