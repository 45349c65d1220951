"""A few thousand elements of base, kept with a diff vector.

They let a later `apply` tell a target that is related to base from one that only has its shapes.
Which elements is a matter of the tensor's name and size alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from diffxfer.checkpoints.companions import companion_path
from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.reader import OpenShard, read_shard
from diffxfer.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.diffs.artifact.manifest import Manifest

SAMPLES_NAME = "base_samples.safetensors"

_IN_ALL = 8192
_FEWEST, _MOST = 4, 64


def samples_per_tensor(tensors: int) -> int:
    """How many elements to keep of each of so many tensors."""
    return max(_FEWEST, min(_MOST, _IN_ALL // max(1, tensors)))


def sample_indices(name: str, elements: int, count: int) -> range:
    """Which elements of a tensor to keep.

    Args:
        name: the tensor's name.
        elements: its size.
        count: how many to keep.

    Returns:
        Flat indices that follow one another, since each jump would be a read of its own.
    """
    first = xxhash.xxh3_64_intdigest(name.encode()) % max(1, elements - count + 1)
    return range(first, min(elements, first + count))


def samples_file(samples: Iterable[bytes]) -> bytes:
    """The side file: tensors `index` (int64) and `value` (float64), both of shape `(samples,)`.

    Args:
        samples: index and value of each, as `TensorResult` packs them, tensor by tensor in the
            manifest's order.
    """
    pairs = np.frombuffer(b"".join(samples), [("index", "<i8"), ("value", "<f8")])
    shape = (len(pairs),)
    layout = layout_shard([("index", "I64", shape), ("value", "F64", shape)])
    return layout.header + pairs["index"].tobytes() + pairs["value"].tobytes()


def read_samples(
    folder: Path, manifest: Manifest
) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """The sampled elements of base, tensor by tensor.

    Args:
        folder: a diff vector.
        manifest: what it says of itself.

    Returns:
        Indices and values by the tensor's name, both of shape `(samples,)`.

    Raises:
        ArtifactError: if they are missing, or are not what the manifest says.
        CheckpointError: if they cannot be read.
    """
    path = companion_path(folder, SAMPLES_NAME)
    if path is None:
        raise ArtifactError(folder / SAMPLES_NAME, "is missing", "make or download it again")
    counts = [entry.samples or 0 for entry in manifest.tensors.values()]
    expected = {"index": ("I64", (sum(counts),)), "value": ("F64", (sum(counts),))}
    specs = read_shard(path)
    if {name: (spec.dtype, spec.shape) for name, spec in specs.items()} != expected:
        problem = "does not hold the samples that the manifest states"
        raise ArtifactError(path, problem, "make or download it again")
    indices = np.frombuffer(_content(specs["index"]), np.dtype("<i8"))
    values = np.frombuffer(_content(specs["value"]), np.dtype("<f8"))
    ends = np.cumsum(counts)[:-1]
    parts = zip(np.split(indices, ends), np.split(values, ends), strict=True)
    return dict(zip(manifest.tensors, parts, strict=bool(counts)))


def _content(spec: TensorSpec) -> bytearray:
    content = bytearray(spec.nbytes)
    OpenShard(spec.shard).read_into(memoryview(content), spec.start)
    return content
