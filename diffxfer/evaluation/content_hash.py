"""Recognising a model that was scored before by its content, not by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.adapters.adapter import read_adapter
from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG, is_adapter
from diffxfer.checkpoints.companions import list_companions, read_bytes
from diffxfer.checkpoints.files import OpenShard
from diffxfer.checkpoints.location import Place
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.delta.from_checkpoints import COMPANIONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.models.graft import GraftSource

_STEP = 1 << 22


def content_hash(folder: Path) -> str:
    """Hash everything in a checkpoint or diff vector that determines its answers.

    All weights are read, since dates and sizes do not distinguish two models of the same shape.

    Args:
        folder: a checkpoint, a diff vector or an adapter.

    Returns:
        An xxh3-128, in hexadecimal.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    whole = xxhash.xxh3_128()
    manifest = read_manifest(folder)
    home = folder
    if manifest is not None and manifest.kind == "diff":
        # Only the manifest has the token tables of a diff vector. That of a graft adds nothing to
        # its other files.
        whole.update(read_bytes(folder / MANIFEST_NAME))
        home = folder / COMPANIONS
    _add_companions(whole, home)
    if is_adapter(Place(folder)):
        whole.update(read_bytes(folder / ADAPTER_CONFIG))
    shards = shards_of(folder)
    buffer = memoryview(bytearray(_STEP))
    for shard in shards:
        opened = OpenShard(shard)
        _add_name(whole, shard.path.name)
        for start in range(0, shard.size, _STEP):
            part = buffer[: min(_STEP, shard.size - start)]
            opened.read_into(part, start)
            whole.update(part)
    return whole.hexdigest()


def shards_of(folder: Path) -> tuple[ShardFile, ...]:
    """The files of weights of a checkpoint, a diff vector or an adapter.

    Args:
        folder: its folder.

    Raises:
        CheckpointError: if one cannot be read.
    """
    place = Place(folder)
    return (read_adapter(place).shard,) if is_adapter(place) else open_weights(folder).shards


def content_hash_in_memory(
    graft: GraftSource, progress: Callable[[int, int], None] | None = None
) -> str:
    """The `content_hash` of the folder that a graft would be written to.

    Args:
        graft: the graft.
        progress: called with the bytes hashed and the total bytes.

    Raises:
        DiffxferError: if a tensor cannot be made.
    """
    whole = xxhash.xxh3_128()
    _add_companions(whole, graft.folder)
    total, done = sum(file.size for file in graft.files), 0
    for file in graft.files:
        _add_name(whole, file.name)
        for part in file.parts():
            whole.update(part)
            done += len(part)
            if progress is not None:
                progress(done, total)
    return whole.hexdigest()


def _add_companions(whole: xxhash.xxh3_128, home: Path) -> None:
    for name in list_companions(home).names:
        _add_name(whole, name)
        whole.update(xxhash.xxh3_128_digest(read_bytes(home / name)))


def _add_name(whole: xxhash.xxh3_128, name: str) -> None:
    whole.update(f"\0{name}\0".encode())
