"""Which shards a checkpoint has, and which tensors they hold, by its index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import read_object
from diffxfer.checkpoints.header import short
from diffxfer.errors import ShardIndexError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

SINGLE_SHARD = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def read_index(path: Path) -> dict[str, set[str]]:
    """What an index says: the tensors of every shard.

    Args:
        path: the index, as `companion_path` gave it.

    Raises:
        CheckpointError: if it is broken, or names a shard that is not beside it.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShardIndexError(path, "has no weight_map", "download it again")
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            problem = f"places {short(tensor)} in {short(shard)}, which is no safetensors file"
            raise ShardIndexError(path, problem, "download it again")
        if "/" in shard or "\0" in shard:
            raise ShardIndexError(
                path,
                f"places {short(tensor)} in {short(shard)}, outside its own folder",
                "a shard lies beside its index; do not trust this checkpoint",
            )
        by_shard.setdefault(shard, set()).add(tensor)
    return by_shard


def check_index(path: Path, shard: str, named: set[str], found: Collection[str]) -> None:
    """Make sure that a shard has the tensors that the index places there, and no others.

    Args:
        path: the index.
        shard: the shard's name.
        named: the tensors that the index places in it.
        found: those that it has.

    Raises:
        ShardIndexError: if they differ.
    """
    absent = sorted(named - set(found))
    if absent:
        problem = f"places {short(absent[0])} in {shard}, which lacks it ({len(absent)} such)"
        raise ShardIndexError(path, problem, "download the index and the shards again")
    extra = sorted(set(found) - named)
    if extra:
        problem = f"does not place {short(extra[0])} in {shard}, which has it ({len(extra)} such)"
        raise ShardIndexError(path, problem, "download the index and the shards again")
