"""Reading checkpoints: which tensors are in which shards, and their bytes.

No file is memory-mapped: bytes are read into buffers that the caller reuses, so memory use does
not grow with the size of a model, a tensor or a shard.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import companion_path, read_config
from diffxfer.checkpoints.encodings.recognise import decoded
from diffxfer.checkpoints.files import open_regular
from diffxfer.checkpoints.foreign import no_weights, refuse_empty, refuse_foreign
from diffxfer.checkpoints.header import parse_header, read_header
from diffxfer.checkpoints.quantized import refuse_quantized
from diffxfer.checkpoints.resolve import Place, require_folder
from diffxfer.checkpoints.shard_index import check_index, read_index
from diffxfer.checkpoints.weights import Weights
from diffxfer.errors import HeaderError, ShardIndexError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec


_REPORT = "report it to the owner of the repository"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in one folder: weights and their config.

    Attributes:
        role: its role: ``"base"``, ``"finetuned"`` or ``"target"``.
        weights: its tensors.
        config: its ``config.json``.
    """

    role: str
    weights: Weights
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.weights.folder

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the model by name."""
        return self.weights.tensors

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(spec.elements for spec in self.tensors.values())


def open_checkpoint(where: Path | Place, role: str) -> Checkpoint:
    """Read the config and all headers of a checkpoint, but no tensor data.

    Args:
        where: the checkpoint.
        role: its role, for messages.

    Returns:
        The checkpoint, checked.

    Raises:
        CheckpointError: if it is not a checkpoint, or is broken, empty, an adapter or quantised.
        HubError: if its headers cannot be fetched from the Hub.
    """
    place = where if isinstance(where, Place) else Place(where)
    folder = place.folder
    require_folder(folder, f"the {role} checkpoint")
    refuse_foreign(place)
    config = read_config(folder)
    weights = decoded(open_weights(place), config)
    refuse_empty(place, config, weights.tensors)  # a diff vector may be empty
    refuse_quantized(folder, config, weights)
    return Checkpoint(role, weights, config)


def open_weights(where: Path | Place) -> Weights:
    """Read the headers of all safetensors files of a checkpoint.

    Args:
        where: a folder or place with ``model.safetensors``, or with an index and its shards; the
            names that diffusers uses are accepted too.

    Returns:
        The tensors as they are on disk, and the shards.

    Raises:
        CheckpointError: if there are no such files, or one of them is broken.
        HubError: if the headers cannot be fetched from the Hub.
    """
    place = where if isinstance(where, Place) else Place(where)
    folder = place.folder
    names = place.shard_names
    if names is None:
        refuse_foreign(place)
        raise no_weights(place)
    index_path = companion_path(folder, names.index)
    if index_path is None:
        tensors = _read_headers(place, [names.single])[names.single]
        return _weights(folder, tensors, indexed=False)
    by_shard = read_index(index_path)
    if names.single not in by_shard and place.has(names.single):
        raise ShardIndexError(
            folder,
            f"has both {names.single} and an index that names other shards",
            "delete the outdated one",
        )
    tensors = {}
    for shard_name, found in _read_headers(place, sorted(by_shard)).items():
        check_index(index_path, shard_name, by_shard[shard_name], found)
        tensors.update(found)
    return _weights(folder, tensors, indexed=True)


def _weights(folder: Path, tensors: Mapping[str, TensorSpec], *, indexed: bool) -> Weights:
    shards = {spec.shard.path: spec.shard for spec in tensors.values()}
    ordered = tuple(shards[path] for path in sorted(shards))
    return Weights(folder, tensors, tensors, ordered, indexed)


def _read_headers(place: Place, names: Iterable[str]) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each shard, by the shard's name."""
    if place.files is None:
        return {name: read_shard(place.folder / name) for name in names}
    from diffxfer.checkpoints.hub.headers import fetch_headers

    files = place.files
    lost = next((name for name in names if name not in files), None)
    if lost is not None:
        raise ShardIndexError(f"{place.label}/{lost}", "is missing on the Hub", _REPORT)
    beginnings = fetch_headers([files[name] for name in names])
    return {name: parse_header(beginnings[name], files[name]) for name in names}


def read_shard(path: Path, *, whole: bool = True) -> dict[str, TensorSpec]:
    """Read the header of one safetensors file.

    Args:
        path: the file.
        whole: refuse a file whose data is not exactly covered by its tensors, such as one that is
            cut short.

    Raises:
        CheckpointError: if it is missing, or its header cannot be read.
    """
    fd = open_regular(path)
    try:
        return read_header(fd, path, whole=whole)
    except OSError as exc:
        raise HeaderError(path, f"cannot be read ({exc.strerror})", "check the disk") from exc
    finally:
        os.close(fd)
