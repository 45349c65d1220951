"""Telling whether the inputs of a chain are those that it was begun with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import list_companions, read_bytes
from diffxfer.checkpoints.reader import OpenShard

if TYPE_CHECKING:
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import Recipe

_BLOCK = 4096
_BLOCKS_A_SHARD = 64
_STEP = 1 << 22


def model_identity(checkpoint: Checkpoint) -> str:
    """Tells one state of a model from another, whatever its dates.

    By headers, companions, and blocks spread over each shard: training changes nearly every
    element, and to read all of a large model takes minutes.

    Args:
        checkpoint: the model.

    Returns:
        An xxh3-128, in hexadecimal.

    Raises:
        CheckpointError: if it cannot be read.
    """
    digest = xxhash.xxh3_128()
    for shard in checkpoint.weights.shards:
        digest.update(repr((shard.path.name, shard.size, shard.header_hash)).encode())
        opened = OpenShard(shard)
        buffer = memoryview(bytearray(min(_BLOCK, shard.size)))
        last = shard.size - len(buffer)
        for start in sorted(
            {last * block // _BLOCKS_A_SHARD for block in range(1, _BLOCKS_A_SHARD + 1)}
        ):
            opened.read_into(buffer, start)
            digest.update(buffer)
    for name in list_companions(checkpoint.folder).names:
        digest.update(f"\0{name}\0".encode() + read_bytes(checkpoint.folder / name))
    return digest.hexdigest()


def data_identity(recipe: Recipe) -> dict[str, str]:
    """By the path of the rows to train on, what tells one state of them from another.

    Args:
        recipe: what is to be done; rows that are not in a file are not looked at.

    Raises:
        OSError: if they cannot be read.
    """
    name = None if recipe.train is None else recipe.train.data
    if name is None or not Path(name).is_file():
        return {}
    digest = xxhash.xxh3_128()
    with Path(name).open("rb") as file:
        while part := file.read(_STEP):
            digest.update(part)
    return {name: digest.hexdigest()}
