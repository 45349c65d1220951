"""The weights of a checkpoint, as a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.files import check_unchanged, one_at_a_time
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.manifest import refuse_diff
from diffxfer.errors import QuantizedError
from diffxfer.models.source import ModelSource
from diffxfer.models.tensors import as_tensor
from diffxfer.streaming.in_memory import new_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from diffxfer.checkpoints.reader import Checkpoint


def checkpoint_source(
    model: Path | str, *, progress: Callable[[int, int], None] | None = None
) -> ModelSource:
    """The weights of a checkpoint.

    Args:
        model: a folder, or a model on the Hub, ``"org/name"`` or ``"org/name@revision"``.
        progress: called with the bytes present and the total bytes of a download.

    Raises:
        CheckpointError: if it is not a sound checkpoint.
        QuantizedError: if its weights are quantised.
        HubError: if it cannot be fetched from the Hub.
    """
    place = find(model, "a model")
    refuse_diff(place.folder, "model")
    checkpoint = open_checkpoint(place, "model")
    if checkpoint.weights.formats:
        formats = " and ".join(checkpoint.weights.formats)
        raise QuantizedError(
            place.label,
            f"is quantised ({formats}), and only plain weights can be loaded in memory",
            "decode it first: diffxfer apply DIFF MODEL --alpha 0 -o DECODED",
        )
    fetch_shards(checkpoint.weights.shards, progress)
    return _CheckpointSource(str(model), checkpoint)


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
        data = new_bytes(stored.nbytes)
        stored.read(one_at_a_time(), 0, data.data)
        for part in stored.parts:
            check_unchanged(part.shard)
        return as_tensor(data, stored.dtype, stored.shape)
