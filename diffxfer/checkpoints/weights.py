"""The tensors of one folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile, StoredTensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one folder.

    Attributes:
        folder: the folder.
        on_disk: every tensor in its files by name, parts of encoded tensors too.
        tensors: every tensor of the model by name; see `encodings.recognise.decoded`.
        shards: the files, sorted by name.
        indexed: whether an index lists them.
        formats: the encodings that were found, as users know them.
    """

    folder: Path
    on_disk: Mapping[str, TensorSpec]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[ShardFile, ...]
    indexed: bool
    formats: tuple[str, ...] = ()
