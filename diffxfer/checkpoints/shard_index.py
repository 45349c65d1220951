"""The index of a checkpoint: its shards, and the tensors that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import read_object
from diffxfer.checkpoints.header import short
from diffxfer.errors import ShardIndexError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ShardNames:
    """How the shards of a checkpoint are named.

    Attributes:
        stem: the beginning of their names.
    """

    stem: str

    @property
    def single(self) -> str:
        """The name of an only shard."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """The name of the index, which lists the tensors of each shard."""
        return f"{self.single}.index.json"

    def shard(self, number: int, total: int) -> str:
        """The name of one of several shards.

        Args:
            number: its number, from 1.
            total: the number of shards.
        """
        return f"{self.stem}-{number:05d}-of-{total:05d}.safetensors"


SHARD_NAMES = (ShardNames("model"), ShardNames("diffusion_pytorch_model"))
"""The names that transformers uses, and those that diffusers uses."""

_ADAPTER = ShardNames("adapter_model")
"""The name that PEFT uses. It is no name of a model's shards: an adapter is no whole model."""

SINGLE_SHARD = SHARD_NAMES[0].single
INDEX_NAME = SHARD_NAMES[0].index


def names_like(shards: Iterable[str]) -> ShardNames:
    """The naming of shards: that of diffusers or PEFT if all follow it, else transformers'.

    Args:
        shards: the names.
    """
    shards = tuple(shards)
    for others in (SHARD_NAMES[1], _ADAPTER):
        if shards and all(name.startswith(others.stem) for name in shards):
            return others
    return SHARD_NAMES[0]


def read_index(path: Path) -> dict[str, set[str]]:
    """Read an index: the tensors of every shard.

    Args:
        path: the index, a path from `companion_path`.

    Raises:
        CheckpointError: if it is broken, or names a shard outside its folder.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShardIndexError(path, "has no weight_map", "download it again")
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            problem = f"places {short(tensor)} in {short(shard)}, which is not a safetensors file"
            raise ShardIndexError(path, problem, "download it again")
        if "/" in shard or "\0" in shard:
            raise ShardIndexError(
                path,
                f"places {short(tensor)} in {short(shard)}, outside its own folder",
                "do not trust this checkpoint: a shard must be in the folder of its index",
            )
        by_shard.setdefault(shard, set()).add(tensor)
    return by_shard


def check_index(path: Path, shard: str, named: set[str], found: Collection[str]) -> None:
    """Check that a shard has exactly the tensors that the index lists for it.

    Args:
        path: the index.
        shard: the shard's name.
        named: the tensors that the index lists for it.
        found: the tensors that it has.

    Raises:
        ShardIndexError: if they differ.
    """
    absent = sorted(named - set(found))
    if absent:
        problem = f"places {short(absent[0])} in {shard}, which lacks it ({len(absent)} in all)"
        raise ShardIndexError(path, problem, "download the index and the shards again")
    extra = sorted(set(found) - named)
    if extra:
        problem = f"does not list {short(extra[0])}, which is in {shard} ({len(extra)} in all)"
        raise ShardIndexError(path, problem, "download the index and the shards again")
