"""Bringing weights from the Hub, once nothing is left to refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from diffxfer.checkpoints.header import ShardFile
    from diffxfer.checkpoints.hub.repo_ids import HubFile


def missing_files(shards: Iterable[ShardFile]) -> list[HubFile]:
    """The files on the Hub, of those that some shards are, that its cache does not have.

    Args:
        shards: of any number of models, in folders or on the Hub.
    """
    files = {shard.path: shard.remote for shard in shards if shard.remote is not None}
    return [file for _, file in sorted(files.items()) if not file.here]


def fetch_shards(
    shards: Iterable[ShardFile],
    progress: Callable[[int, int], None] | None = None,
    *,
    out: Path | None = None,
    needed: int = 0,
) -> None:
    """Download the shards that are on the Hub alone, all at the same time, if they have room.

    Args:
        shards: of any number of models, in folders or on the Hub.
        progress: called with the bytes that are there and the bytes in all.
        out: a folder that is to be made of them, and could be made without downloading them.
        needed: how many more bytes that takes.

    Raises:
        DiskSpaceError: if they have not.
        HubError: if a file cannot be had.
    """
    files = missing_files(shards)
    if not files:
        return
    from diffxfer.checkpoints.hub.download import download, refuse_small_cache

    refuse_small_cache(files, out, needed)
    download(files, progress)
