"""A few thousand elements of base, kept with a diff vector.

They let a later `apply` tell a target that is related to base from one that only has its shapes.
Which elements is a matter of the tensor's name and size alone.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.header import layout_shard

if TYPE_CHECKING:
    from collections.abc import Iterable

SAMPLES_NAME = "base_samples.safetensors"

_IN_ALL = 8192
_FEWEST, _MOST = 4, 64


def samples_per_tensor(tensors: int) -> int:
    """How many elements to keep of each of so many tensors."""
    return max(_FEWEST, min(_MOST, _IN_ALL // max(1, tensors)))


def sample_indices(name: str, elements: int, count: int) -> tuple[int, ...]:
    """Which elements of a tensor to keep.

    Args:
        name: the tensor's name.
        elements: its size.
        count: how many to keep, fewer where two fall on one.

    Returns:
        Flat indices, ascending.
    """
    if elements <= count:
        return tuple(range(elements))
    key = name.encode()
    drawn = (xxhash.xxh3_64_intdigest(key, seed=number) for number in range(count))
    return tuple(sorted({value % elements for value in drawn}))


def samples_file(samples: Iterable[tuple[tuple[int, float], ...]]) -> bytes:
    """The side file: tensors `index` (int64) and `value` (float64), both of shape `(samples,)`.

    Args:
        samples: index and value of each, tensor by tensor in the manifest's order.
    """
    flat = [pair for tensor in samples for pair in tensor]
    shape = (len(flat),)
    layout = layout_shard([("index", "I64", shape), ("value", "F64", shape)])
    indices = struct.pack(f"<{len(flat)}q", *(index for index, _ in flat))
    values = struct.pack(f"<{len(flat)}d", *(value for _, value in flat))
    return layout.header + indices + values
