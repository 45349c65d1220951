"""The location of a checkpoint's files: a local folder or the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from diffxfer.checkpoints.shard_index import SHARD_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.hub.repo_ids import HubFile
    from diffxfer.checkpoints.shard_index import ShardNames


@dataclass(frozen=True, slots=True)
class Place:
    """The location of a checkpoint.

    Attributes:
        folder: its folder; for a model on the Hub, its commit's folder in the Hub's cache, which
            has all files but the weights.
        files: its files on the Hub by name; None for a local folder.
    """

    folder: Path
    files: Mapping[str, HubFile] | None = None

    @property
    def label(self) -> str:
        """Its name in messages."""
        file = next(iter(self.files.values()), None) if self.files is not None else None
        return str(self.folder) if file is None else f"{file.repo}@{file.commit[:8]}"

    def has(self, name: str) -> bool:
        """Whether it has a file of that name, locally or on the Hub."""
        if self.files is not None:
            return name in self.files
        return os.path.lexists(self.folder / name)

    def matching(self, pattern: str) -> list[str]:
        """The sorted names of its files that match a pattern such as ``*.bin``."""
        if self.files is not None:
            top = (name for name in self.files if "/" not in name)
            return sorted(name for name in top if fnmatchcase(name, pattern))
        return sorted(path.name for path in self.folder.glob(pattern))

    @property
    def shard_names(self) -> ShardNames | None:
        """How its shards are named; None if it has neither a single shard nor an index."""
        return next((n for n in SHARD_NAMES if self.has(n.index) or self.has(n.single)), None)
