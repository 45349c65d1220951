"""The weights of a checkpoint, as a source."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import finalize

from diffxfer.checkpoints.companions import companion_path, list_companions, read_config
from diffxfer.checkpoints.encodings.quantization_config import paths_to_quantization
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.files import check_unchanged, one_at_a_time
from diffxfer.checkpoints.json_edit import edit_json
from diffxfer.checkpoints.quantized import CONFIG_FILES
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.resolve import find
from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.checkpoints.stored import BITS
from diffxfer.diffs.artifact.kind import refuse_diff
from diffxfer.models.source import ModelSource
from diffxfer.models.tensors import as_tensor, torch_dtype
from diffxfer.streaming.in_memory import new_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor

_CONFIG = "config.json"
_AT_ONCE = 1 << 20


def checkpoint_source(
    model: Path | str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ModelSource:
    """The weights of a checkpoint; quantised ones are decoded.

    Args:
        model: a folder, or a model on the Hub, ``"org/name"`` or ``"org/name@revision"``.
        progress: called with the bytes present and the total bytes of a download.

    Raises:
        CheckpointError: if it is not a sound checkpoint.
        QuantizedError: if its weights are quantised in a way that cannot be decoded.
        HubError: if it cannot be fetched from the Hub.
    """
    checkpoint = open_plain(model)
    fetch_shards(checkpoint.weights.shards, progress)
    if checkpoint.weights.formats:
        return _DecodedSource(str(model), checkpoint)
    return _CheckpointSource(str(model), checkpoint)


def open_plain(model: Path | str) -> Checkpoint:
    """Open a checkpoint whose weights can be loaded; reads only its headers.

    Args:
        model: a folder, or a model on the Hub, ``"org/name"`` or ``"org/name@revision"``.

    Raises:
        CheckpointError: if it is not a sound checkpoint.
        QuantizedError: if its weights are quantised in a way that cannot be decoded.
        HubError: if it cannot be fetched from the Hub.
    """
    place = find(model, "a model")
    refuse_diff(place.folder, "model")
    return open_checkpoint(place, "model")


class _CheckpointSource(ModelSource):
    def __init__(self, label: str, checkpoint: Checkpoint) -> None:
        self.label = label
        self.folder = checkpoint.folder
        self._tensors = checkpoint.tensors

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def dtype(self, name: str) -> str:
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        made = _read(stored)
        for part in stored.parts:
            check_unchanged(part.shard)
        return made


class _DecodedSource(_CheckpointSource):
    """Decoded weights; companions that do not say they are quantised are in a temporary folder."""

    def __init__(self, label: str, checkpoint: Checkpoint) -> None:
        super().__init__(label, checkpoint)
        with ExitStack() as stack:
            self.folder = stack.enter_context(scratch_folder(None))
            _copy_companions(checkpoint.folder, self.folder)
            self._close = finalize(self, stack.pop_all().close)

    def dtype(self, name: str) -> str:
        return self._tensors[name].written_dtype

    def close(self) -> None:
        self._close()


def _copy_companions(folder: Path, out: Path) -> None:
    for name in list_companions(folder).names:
        path = companion_path(folder, name)
        if path is not None and name not in CONFIG_FILES:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
    paths = paths_to_quantization(read_config(folder))
    if paths:
        (out / _CONFIG).write_bytes(edit_json((out / _CONFIG).read_bytes(), {}, paths))


def _read(stored: StoredTensor) -> torch.Tensor:
    """All values, rounded to the dtype in which they would be written."""
    import torch

    made = new_bytes(stored.elements * BITS[stored.written_dtype] // 8)
    if stored.dtype == stored.written_dtype:
        stored.read(one_at_a_time(), 0, made.data)
        return as_tensor(made, stored.dtype, stored.shape)
    values, files = as_tensor(made, stored.written_dtype, stored.shape), one_at_a_time()
    flat, dtype = values.view(-1), torch_dtype(stored.dtype)
    assert dtype is not None
    decoded = torch.empty(min(_AT_ONCE, stored.elements), dtype=dtype)
    for start in range(0, stored.elements, _AT_ONCE):
        part = decoded[: stored.elements - start]
        stored.read(files, start, part.view(torch.uint8).numpy().data)
        flat[start : start + len(part)] = part
    return values
