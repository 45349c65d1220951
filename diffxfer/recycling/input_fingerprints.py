"""Telling whether the inputs of a chain are those that it was begun with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import list_companions, read_bytes
from diffxfer.checkpoints.reader import OpenShard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import Recipe

_BLOCK = 4096
_BLOCKS_A_SHARD = 64
_STEP = 1 << 22
_TASK_FILES = (".py", ".yaml", ".yml")


def sampled_fingerprint(checkpoint: Checkpoint) -> str:
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


def file_fingerprints(recipe: Recipe, home: Path, run: Path) -> dict[str, str]:
    """What tells one state from another, of everything else that a recipe names, by its path.

    Those are the rows to train on, where they are in a file; the files that a command's words name,
    such as its script; and the YAML files and code in the folder of tasks.

    Args:
        recipe: what is to be done.
        home: the folder that a command is run in.
        run: the folder of the run, which may lie in that of the tasks, and is no part of it.

    Raises:
        OSError: if they cannot be read.
    """
    train, scored = recipe.train, recipe.eval
    named: set[Path] = set()
    if train is not None and train.data is not None:
        named.add(Path(train.data))
    if train is not None and train.command is not None:
        # Not the program: another Python is no other recipe.
        named |= {home / word for word in shlex.split(train.command)[1:]}
    found = {str(path): _digest([path]) for path in sorted(named) if _is_file(path)}
    if scored is not None and scored.include_path is not None:
        folder = Path(scored.include_path)
        files = (path for path in folder.rglob("*") if path.suffix in _TASK_FILES)
        own = (path for path in files if path.is_file() and not path.is_relative_to(run))
        found[str(folder)] = _digest(sorted(own))
    return found


def _is_file(path: Path) -> bool:
    # `Path.is_file` fails at an argument that is too long for a name.
    return os.path.isfile(path)  # noqa: PTH113


def _digest(files: Iterable[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(_STEP):
                digest.update(part)
    return digest.hexdigest()
