"""Sources of weights in memory, for tests of what is built on sources."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from diffxfer.models.source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class Weights(ModelSource):
    """Tensors in memory, with the companions of a folder."""

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor], label: str = "") -> None:
        self.folder = folder
        self.label = label or folder.name
        self._tensors = tensors

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def dtype(self, name: str) -> str:
        return DTYPES[self._tensors[name].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()


def stored(folder: Path) -> Weights:
    """The tensors of a checkpoint of one shard."""
    return Weights(folder, load_file(folder / "model.safetensors"))


def store(source: ModelSource, folder: Path) -> Path:
    """Write a source as a checkpoint of one shard."""
    folder.mkdir(parents=True)
    tensors = {name: source.tensor(name).contiguous() for name in source.names()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return folder


def saved(model: Any, folder: Path, **config: Any) -> Weights:
    """A model as transformers saves it."""
    model.save_pretrained(folder)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return stored(folder)
