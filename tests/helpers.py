"""Files and tensors that several tests share."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors.torch import save_file

from diffxfer.checkpoints.header import read_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffxfer.checkpoints.stored import TensorSpec

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The float dtypes by their safetensors names."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def raw_shard(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file made by hand, valid or not.

    Args:
        header: its JSON as bytes, or a value to be written as JSON.
        data: the bytes after the header.
        length: the stated length of the header, None for the true one.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Write a shard as transformers does, and read its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return read_specs(path)


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """The header of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, path)
    finally:
        os.close(fd)


def to_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor as they lie on disk."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_bits(tensor: Tensor) -> Tensor:
    """A tensor's elements as integers, so that −0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(to_bits(left), to_bits(right))


def block_checksum(tensor: Tensor) -> str:
    """A tensor's checksum, implemented independently from its definition."""
    data, step = to_bytes(tensor), 262144 * tensor.element_size()
    whole = xxhash.xxh3_128()
    for start in range(0, len(data), step):
        whole.update(xxhash.xxh3_128(data[start : start + step]).digest())
    return whole.hexdigest()


def values(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Finite numbers of every kind: ordinary, large, subnormal, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 16, shape, generator=generator)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    made = torch.where(kinds == 1, made * 1000, made)
    made = torch.where(kinds == 2, made * 1e-7, made)
    made = torch.where(kinds == 3, torch.copysign(torch.zeros_like(made), made), made)
    return made.to(DTYPES[dtype])


def open_files() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/dev/fd").iterdir()))
