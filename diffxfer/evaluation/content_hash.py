"""Telling whether a model is the one that was scored before: by its content, not by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import list_companions, read_bytes
from diffxfer.checkpoints.place import MANIFEST_NAME
from diffxfer.checkpoints.reader import OpenShard, open_weights
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.source import COMPANIONS

if TYPE_CHECKING:
    from pathlib import Path

_STEP = 1 << 22


def content_hash(folder: Path) -> str:
    """A hash of everything in a checkpoint or diff vector that shapes what it answers.

    The weights are read whole, at the speed of the disk: dates and sizes do not tell two models
    of one shape apart.

    Args:
        folder: a checkpoint, or a diff vector.

    Returns:
        An xxh3-128, in hexadecimal.

    Raises:
        CheckpointError: if it cannot be read.
    """
    whole = xxhash.xxh3_128()
    manifest = read_manifest(folder)
    home = folder
    if manifest is not None and manifest.kind == "diff":
        # How its tokens pair stands there alone. A graft's says nothing that its files do not.
        whole.update(read_bytes(folder / MANIFEST_NAME))
        home = folder / COMPANIONS
    for name in list_companions(home).names:
        whole.update(f"\0{name}\0".encode())
        whole.update(xxhash.xxh3_128_digest(read_bytes(home / name)))
    shards = open_weights(folder).shards
    buffer = memoryview(bytearray(_STEP))
    for shard in shards:
        opened = OpenShard(shard)
        whole.update(f"\0{shard.path.name}\0".encode())
        for start in range(0, shard.size, _STEP):
            part = buffer[: min(_STEP, shard.size - start)]
            opened.read_into(part, start)
            whole.update(part)
    return whole.hexdigest()
