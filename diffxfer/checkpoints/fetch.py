"""Downloading weights from the Hub, after all checks have passed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from diffxfer.checkpoints.hub.repo_ids import HubFile
    from diffxfer.checkpoints.stored import ShardFile


def missing_files(shards: Iterable[ShardFile]) -> list[HubFile]:
    """The Hub files of some shards that are not in the cache.

    Args:
        shards: shards of any number of models, in folders or on the Hub.
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
    """Download the shards that are only on the Hub, in parallel, if there is enough disk space.

    Args:
        shards: shards of any number of models, in folders or on the Hub.
        progress: called with the bytes present and the total bytes.
        out: the output folder made from them, which could also be made by streaming.
        needed: bytes that the output folder still needs.

    Raises:
        DiskSpaceError: if there is too little disk space.
        HubError: if a file cannot be downloaded.
    """
    files = missing_files(shards)
    if not files:
        return
    from diffxfer.checkpoints.hub.download import download, refuse_small_cache

    refuse_small_cache(files, out, needed)
    download(files, progress)
