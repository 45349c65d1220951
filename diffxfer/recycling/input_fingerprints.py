"""Fingerprints by which a chain detects that one of its inputs changed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG
from diffxfer.checkpoints.companions import list_companions, read_bytes
from diffxfer.checkpoints.files import OpenShard
from diffxfer.diffs.delta.from_adapter import LORA

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import Recipe

_BLOCK = 4096
_BLOCKS_A_SHARD = 64
_STEP = 1 << 22
_TASK_FILES = (".py", ".yaml", ".yml")


def sampled_fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of a model's headers, companions and blocks sampled from each shard.

    Sampling suffices, because training changes nearly every element; reading a large model
    completely would take minutes. File dates have no effect.

    Args:
        checkpoint: the model, which may be made of a LoRA adapter and its base; then it is the
            adapter's file and config that are hashed, and base's companions.

    Returns:
        An xxh3-128, in hexadecimal.

    Raises:
        CheckpointError: if a file cannot be read.
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
    files = {name: checkpoint.folder / name for name in list_companions(checkpoint.folder).names}
    if LORA in checkpoint.weights.formats:
        # Δ depends on it, but it is no companion of the model that the adapter makes.
        files[ADAPTER_CONFIG] = checkpoint.weights.shards[0].path.parent / ADAPTER_CONFIG
    for name, path in files.items():
        digest.update(f"\0{name}\0".encode() + read_bytes(path))
    return digest.hexdigest()


def file_fingerprints(recipe: Recipe, home: Path, run: Path) -> dict[str, str]:
    """Hash the other files that a recipe names, by path.

    These are the file of training rows, the files among the arguments of a training command, such
    as its script, and the YAML and Python files in the folder of tasks.

    Args:
        recipe: the recipe.
        home: the working directory of the training command.
        run: the folder of the run; if it is inside the folder of tasks, it is skipped.

    Raises:
        OSError: if a file cannot be read.
    """
    train, scored = recipe.train, recipe.eval
    named: set[Path] = set()
    if train is not None and train.data is not None:
        named.add(Path(train.data))
    if train is not None and train.command is not None:
        # The program itself is skipped: another Python does not make another recipe.
        named |= {home / word for word in shlex.split(train.command)[1:]}
    found = {str(path): _digest([path]) for path in sorted(named) if _is_file(path)}
    if scored is not None and scored.include_path is not None:
        folder = Path(scored.include_path)
        files = (path for path in folder.rglob("*") if path.suffix in _TASK_FILES)
        own = (path for path in files if path.is_file() and not path.is_relative_to(run))
        found[str(folder)] = _digest(sorted(own))
    return found


def _is_file(path: Path) -> bool:
    # `Path.is_file` raises an error if an argument is too long for a file name.
    return os.path.isfile(path)  # noqa: PTH113


def _digest(files: Iterable[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(_STEP):
                digest.update(part)
    return digest.hexdigest()
