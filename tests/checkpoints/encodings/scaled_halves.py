"""An encoding made for the tests: float16 values with one float32 scale per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffxfer.checkpoints.encodings.encoding import Encoding
from diffxfer.checkpoints.stored import StoredTensor
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from diffxfer.checkpoints.stored import Files, TensorSpec

SUFFIX = ".half_scale"


@dataclass(frozen=True, slots=True)
class ScaledHalf(StoredTensor):
    """Values are `half * scale`, in float32."""

    half: TensorSpec
    scale: TensorSpec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The values, and their scale."""
        return self.half, self.scale

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements."""
        halves = np.frombuffer(files.read(self.half, start, len(buffer) // 4), "<f2")
        (scale,) = np.frombuffer(files.read(self.scale, 0, 1, slot=1), "<f4")
        np.multiply(halves.astype("<f4"), scale, out=np.frombuffer(buffer, "<f4"))


def find(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Iterator[ScaledHalf]:
    """Find the tensors that have a scale.

    Raises:
        CheckpointError: if a scale belongs to no float16 tensor, or is not one float32.
    """
    del config
    for name, scale in tensors.items():
        if not name.endswith(SUFFIX):
            continue
        half = tensors.get(name.removesuffix(SUFFIX))
        if half is None or half.dtype != "F16":
            found = "none" if half is None else half.dtype
            problem = f"{name} has {found} to scale, expected {name.removesuffix(SUFFIX)} in F16"
            raise CheckpointError(scale.shard.path, problem, "download or save it again")
        if (scale.dtype, scale.elements) != ("F32", 1):
            problem = f"{name} is {scale.dtype} {scale.shape}, expected one F32"
            raise CheckpointError(scale.shard.path, problem, "download or save it again")
        yield ScaledHalf(half.name, "F32", half.shape, half.shard, half, scale)


ENCODING = Encoding("float16 with one scale a tensor", find)


def encode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encode every tensor that has more than one dimension."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            found[name] = tensor
            continue
        scale = tensor.abs().max().float() / 3
        found[name] = (tensor.float() / scale).half()
        found[name + SUFFIX] = scale
    return found


def decode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of encoded tensors, stored as plain float32."""
    return {
        name: tensor.float() * tensors[name + SUFFIX] if name + SUFFIX in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SUFFIX)
    }


def example(seed: int, near: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model with a tensor of several chunks, or one that is near another."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (600, 1003),
        "model.layers.1.mlp.up_proj.weight": (40, 30),
        "model.norm.weight": (8,),
        "lm_head.weight": (12, 8),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if near is not None:
        made = {name: near[name] + 0.01 * tensor for name, tensor in made.items()}
    return made
