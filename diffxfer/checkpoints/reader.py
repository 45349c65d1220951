"""Reading checkpoints: which tensors lie in which shards, and their bytes.

Nothing is mapped into memory: bytes are read into buffers that the caller reuses, so that the
memory used does not grow with a model, a tensor or a shard.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import companion_path, read_config, read_object
from diffxfer.checkpoints.header import (
    ShardFile,
    TensorSpec,
    read_header,
    short,
    stat_identity,
)
from diffxfer.checkpoints.quantized import refuse_quantized
from diffxfer.checkpoints.source import require_folder
from diffxfer.errors import CheckpointError, HeaderError, InputChangedError, ShardIndexError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SINGLE_SHARD = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_UNCHANGED = "leave the inputs alone while it runs, and run it again"


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one folder.

    Attributes:
        folder: where they are.
        tensors: every tensor by its name on disk.
        shards: the files, in the order of their names.
        indexed: whether an index names them.
    """

    folder: Path
    tensors: Mapping[str, TensorSpec]
    shards: tuple[ShardFile, ...]
    indexed: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in one folder: weights and their config.

    Attributes:
        role: what it is here: ``"base"``, ``"finetuned"`` or ``"target"``.
        weights: its tensors.
        config: its ``config.json``.
    """

    role: str
    weights: Weights
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.weights.folder

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name on disk."""
        return self.weights.tensors

    @property
    def elements(self) -> int:
        """The elements of all of them."""
        return sum(spec.elements for spec in self.tensors.values())


def open_checkpoint(folder: Path, role: str) -> Checkpoint:
    """Read the config and every header of a checkpoint, and no data.

    Args:
        folder: the checkpoint.
        role: what it is to be, for messages.

    Returns:
        The checkpoint, checked.

    Raises:
        CheckpointError: if it is none, is broken, is empty, is an adapter, or is quantised.
    """
    require_folder(folder, f"the {role} checkpoint")
    _refuse_adapter(folder)
    config = read_config(folder)
    weights = open_weights(folder)
    if not weights.tensors:  # a diff vector may well be empty, a model may not
        problem = "has no tensors, where a whole checkpoint is due"
        raise CheckpointError(folder / SINGLE_SHARD, problem, "download or save it again")
    refuse_quantized(folder, config, weights.tensors)
    return Checkpoint(role, weights, config)


def open_weights(folder: Path) -> Weights:
    """Read every header of the safetensors files in a folder.

    Args:
        folder: one that has ``model.safetensors``, or an index and what it names.

    Returns:
        The tensors and the shards.

    Raises:
        CheckpointError: if there are none, or one of them is broken.
    """
    index_path = companion_path(folder, INDEX_NAME)
    if index_path is None:
        if not os.path.lexists(folder / SINGLE_SHARD):
            raise _no_weights(folder)
        tensors = read_shard(folder / SINGLE_SHARD)
        return _weights(folder, tensors, indexed=False)
    by_shard = _read_index(index_path)
    if SINGLE_SHARD not in by_shard and os.path.lexists(folder / SINGLE_SHARD):
        raise ShardIndexError(
            folder,
            f"has both {SINGLE_SHARD} and an index that names other shards",
            "remove the one that is stale",
        )
    tensors = {}
    for shard_name in sorted(by_shard):
        found = read_shard(folder / shard_name)
        _check_index(index_path, shard_name, by_shard[shard_name], found)
        tensors.update(found)
    return _weights(folder, tensors, indexed=True)


def _weights(folder: Path, tensors: Mapping[str, TensorSpec], *, indexed: bool) -> Weights:
    shards = {spec.shard.path: spec.shard for spec in tensors.values()}
    return Weights(folder, tensors, tuple(shards[path] for path in sorted(shards)), indexed)


def _refuse_adapter(folder: Path) -> None:
    # Whether they lead anywhere is for those to see who open them.
    if any(os.path.lexists(folder / name) for name in (SINGLE_SHARD, INDEX_NAME)):
        return
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if os.path.lexists(folder / name):
            raise CheckpointError(
                folder,
                f"is a LoRA adapter ({name}), where a whole checkpoint is due",
                "merge it into its base first: "
                "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(…)",
            )


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            folder,
            f"has pickled weights only ({pickles[0]}), which are never loaded: a pickle runs code",
            "save it as safetensors where you trust it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"only {', '.join(others[:3])}" if others else "none"
    return CheckpointError(
        folder,
        f"expected {SINGLE_SHARD} or {INDEX_NAME}, found {found}",
        "save the model with save_pretrained, or download the whole folder",
    )


def _read_index(path: Path) -> dict[str, set[str]]:
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


def _check_index(path: Path, shard: str, named: set[str], found: Mapping[str, TensorSpec]) -> None:
    absent = sorted(named - found.keys())
    if absent:
        problem = f"places {short(absent[0])} in {shard}, which lacks it ({len(absent)} such)"
        raise ShardIndexError(path, problem, "download the index and the shards again")
    extra = sorted(found.keys() - named)
    if extra:
        problem = f"does not place {short(extra[0])} in {shard}, which has it ({len(extra)} such)"
        raise ShardIndexError(path, problem, "download the index and the shards again")


def read_shard(path: Path, *, whole: bool = True) -> dict[str, TensorSpec]:
    """Read the header of one safetensors file.

    Args:
        path: the file.
        whole: refuse one whose data is not exactly its tensors', such as one that is cut short.

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
        # Looked at before it is opened, since opening a device may already have an effect; and
        # O_NONBLOCK, since opening a FIFO that took its place since would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _not_regular(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        what = "is a link to nothing" if path.is_symlink() else "is missing"
        raise ShardIndexError(path, what, "download the checkpoint again") from exc
    except OSError as exc:
        problem = f"cannot be opened ({exc.strerror})"
        raise HeaderError(path, problem, "check that it can be read") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(path)
    return fd


def _not_regular(path: Path) -> HeaderError:
    return HeaderError(path, "is not a regular file", "replace it by the shard itself")


class OpenShard:
    """A shard that is open for reading; closed when the last reference to it goes.

    Args:
        shard: the file; it must still be the one whose header was read.

    Raises:
        InputChangedError: if it is not.
    """

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        self._fd = -1
        try:
            self._fd = _open_regular(shard.path)
        except ShardIndexError as exc:
            raise InputChangedError(shard.path, "vanished while it was read", _UNCHANGED) from exc
        if stat_identity(os.fstat(self._fd)) != shard.identity:
            self.close()
            raise InputChangedError(shard.path, "changed while it was read", _UNCHANGED)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it before that."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file.

        Args:
            buffer: bytes to overwrite, all of them.
            offset: the first byte in the file.

        Raises:
            InputChangedError: if the file ends before the buffer is full.
            CheckpointError: if the disk does not give it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as exc:
                problem = f"cannot be read at byte {offset + done} ({exc.strerror})"
                raise CheckpointError(self.shard.path, problem, "check the disk") from exc
            if count == 0:
                raise InputChangedError(self.shard.path, "became shorter", _UNCHANGED)
            done += count


def check_unchanged(shard: ShardFile) -> None:
    """Make sure, by its path, that a shard is still the file whose header was read.

    Raises:
        InputChangedError: if it is gone or another.
    """
    try:
        identity = stat_identity(shard.path.stat())
    except OSError as exc:
        raise InputChangedError(shard.path, "vanished while it was read", _UNCHANGED) from exc
    if identity != shard.identity:
        raise InputChangedError(shard.path, "changed while it was read", _UNCHANGED)


def same_bytes(left: TensorSpec, right: TensorSpec) -> bool:
    """Whether two tensors are the same; stops at the first difference.

    Args:
        left: one tensor.
        right: another one.

    Raises:
        CheckpointError: if one cannot be read as it was.
    """
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    files = OpenShard(left.shard), OpenShard(right.shard)
    step = 1 << 20
    # Views are compared byte by byte, a hundred times slower than what they look at. What lies past
    # the end of the last step is the same in both: the step before it.
    buffers = bytearray(step), bytearray(step)
    for done in range(0, left.nbytes, step):
        count = min(step, left.nbytes - done)
        files[0].read_into(memoryview(buffers[0])[:count], left.start + done)
        files[1].read_into(memoryview(buffers[1])[:count], right.start + done)
        if buffers[0] != buffers[1]:
            return False
    return True
