"""Reading checkpoints: which tensors are in which shards, and their bytes.

No file is memory-mapped: bytes are read into buffers that the caller reuses, so memory use does
not grow with the size of a model, a tensor or a shard.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import companion_path, read_config
from diffxfer.checkpoints.foreign import no_weights, refuse_empty, refuse_foreign
from diffxfer.checkpoints.header import (
    ShardFile,
    TensorSpec,
    parse_header,
    read_header,
    stat_identity,
)
from diffxfer.checkpoints.quantized import refuse_quantized
from diffxfer.checkpoints.resolve import Place, require_folder
from diffxfer.checkpoints.shard_index import check_index, read_index
from diffxfer.errors import CheckpointError, HeaderError, InputChangedError, ShardIndexError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.hub.ranges import RemoteFile

_REPORT = "report it to the owner of the repository"
_UNCHANGED = "run it again, and do not change the inputs while it runs"


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one folder.

    Attributes:
        folder: the folder.
        tensors: every tensor by its name on disk.
        shards: the files, sorted by name.
        indexed: whether an index lists them.
    """

    folder: Path
    tensors: Mapping[str, TensorSpec]
    shards: tuple[ShardFile, ...]
    indexed: bool


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
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name on disk."""
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
    weights = open_weights(place)
    refuse_empty(place, config, weights.tensors)  # a diff vector may be empty
    refuse_quantized(folder, config, weights.tensors)
    return Checkpoint(role, weights, config)


def open_weights(where: Path | Place) -> Weights:
    """Read the headers of all safetensors files of a checkpoint.

    Args:
        where: a folder or place with ``model.safetensors``, or with an index and its shards; the
            names that diffusers uses are accepted too.

    Returns:
        The tensors and the shards.

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
    return Weights(folder, tensors, tuple(shards[path] for path in sorted(shards)), indexed)


def _read_headers(place: Place, names: Iterable[str]) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each shard, by the shard's name."""
    if place.files is None:
        return {name: read_shard(place.folder / name) for name in names}
    from diffxfer.checkpoints.hub.ranges import fetch_headers

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
    fd = _open_regular(path)
    try:
        return read_header(fd, path, whole=whole)
    except OSError as exc:
        raise HeaderError(path, f"cannot be read ({exc.strerror})", "check the disk") from exc
    finally:
        os.close(fd)


def _open_regular(path: Path) -> int:
    """Open a file for reading, unless it is a FIFO, a device or a folder."""
    try:
        # Check the kind before opening, since opening a device may have an effect. O_NONBLOCK,
        # since a FIFO may have replaced the file meanwhile and opening it would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _not_regular(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        what = "is a broken link" if path.is_symlink() else "is missing"
        raise ShardIndexError(path, what, "download the checkpoint again") from exc
    except OSError as exc:
        problem = f"cannot be opened ({exc.strerror})"
        raise HeaderError(path, problem, "check that it can be read") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(path)
    return fd


def _not_regular(path: Path) -> HeaderError:
    return HeaderError(path, "is not a regular file", "replace it with the shard itself")


class OpenShard:
    """A shard that is open for reading; closed when its last reference is dropped.

    Args:
        shard: the file whose header was read; it is read from the Hub if it is not local.

    Raises:
        InputChangedError: if the file has changed since.
    """

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        self._file: _LocalFile | RemoteFile | None = None
        if shard.remote is not None and shard.away:
            from diffxfer.checkpoints.hub.ranges import RemoteFile

            self._file = RemoteFile(shard.remote)
        else:
            self._file = _LocalFile(shard)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it now."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def abandon(self) -> None:
        """Abort requests to the Hub in progress, if any; threads that wait for them then fail."""
        if not isinstance(self._file, _LocalFile):  # another file could get its descriptor number
            self.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file.

        Args:
            buffer: the bytes to fill completely.
            offset: the first byte in the file.

        Raises:
            InputChangedError: if the file ends before the buffer is full.
            CheckpointError: if it cannot be read from disk.
            HubError: if it cannot be fetched from the Hub.
        """
        assert self._file is not None, "it is open"
        self._file.read_into(buffer, offset)


class _LocalFile:
    """An open local shard."""

    def __init__(self, shard: ShardFile) -> None:
        self._path = shard.path
        try:
            self._fd = _open_regular(shard.path)
        except ShardIndexError as exc:
            raise InputChangedError(shard.path, "vanished while it was read", _UNCHANGED) from exc
        status = os.fstat(self._fd)
        # A file from the Hub is identified by its name in the cache, not by its mtime.
        same = (
            status.st_size == shard.size
            if shard.remote
            else stat_identity(status) == shard.identity
        )
        if not same:
            self.close()
            raise InputChangedError(shard.path, "changed while it was read", _UNCHANGED)

    def close(self) -> None:
        os.close(self._fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as exc:
                problem = f"cannot be read at byte {offset + done} ({exc.strerror})"
                raise CheckpointError(self._path, problem, "check the disk") from exc
            if count == 0:
                raise InputChangedError(self._path, "was truncated while it was read", _UNCHANGED)
            done += count


def check_unchanged(shard: ShardFile) -> None:
    """Check, by path, that a shard is still the file whose header was read.

    Raises:
        InputChangedError: if it is missing or has changed.
    """
    if shard.remote is not None:
        return  # a commit never changes
    try:
        identity = stat_identity(shard.path.stat())
    except OSError as exc:
        raise InputChangedError(shard.path, "vanished while it was read", _UNCHANGED) from exc
    if identity != shard.identity:
        raise InputChangedError(shard.path, "changed while it was read", _UNCHANGED)


def same_bytes(left: TensorSpec, right: TensorSpec) -> bool:
    """Whether two tensors are equal; stops at the first difference.

    Args:
        left: the first tensor.
        right: the second tensor.

    Raises:
        CheckpointError: if one cannot be read, or has changed.
    """
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    files = OpenShard(left.shard), OpenShard(right.shard)
    step = 1 << 20
    # Compare whole bytearrays: comparing memoryviews goes byte by byte, a hundred times slower.
    # After a short last step, both buffers still end with the same bytes of the previous step.
    buffers = bytearray(step), bytearray(step)
    for done in range(0, left.nbytes, step):
        count = min(step, left.nbytes - done)
        files[0].read_into(memoryview(buffers[0])[:count], left.start + done)
        files[1].read_into(memoryview(buffers[1])[:count], right.start + done)
        if buffers[0] != buffers[1]:
            return False
    return True
