"""A few thousand elements of base, stored with a diff vector.

With them a later `apply` distinguishes a target that is related to base from one that only has the
same shapes. The tensor's name and size determine which elements are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from diffxfer.checkpoints.companions import companion_path
from diffxfer.checkpoints.files import OpenShard
from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.reader import read_shard
from diffxfer.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from diffxfer.checkpoints.stored import TensorSpec
    from diffxfer.diffs.artifact.manifest import Manifest

SAMPLES_NAME = "base_samples.safetensors"

_IN_ALL = 8192
_FEWEST, _MOST = 4, 64


def samples_per_tensor(tensors: int) -> int:
    """The number of elements to store per tensor, for this number of tensors."""
    return max(_FEWEST, min(_MOST, _IN_ALL // max(1, tensors)))


def sample_indices(name: str, elements: int, count: int) -> range:
    """The elements of a tensor to store.

    Args:
        name: the tensor's name.
        elements: its number of elements.
        count: the number of elements to store.

    Returns:
        Consecutive flat indices, so that one read is enough.
    """
    first = xxhash.xxh3_64_intdigest(name.encode()) % max(1, elements - count + 1)
    return range(first, min(elements, first + count))


def samples_file(samples: Iterable[bytes]) -> bytes:
    """The samples file: tensors `index` (int64) and `value` (float64), both of shape `(samples,)`.

    Args:
        samples: packed samples of each tensor, as in `TensorResult`, in the manifest's order.
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
        manifest: its manifest.

    Returns:
        Indices and values by the tensor's name, both of shape `(samples,)`.

    Raises:
        ArtifactError: if they are missing, or differ from the manifest.
        CheckpointError: if they cannot be read.
    """
    path = companion_path(folder, SAMPLES_NAME)
    if path is None:
        raise ArtifactError(folder / SAMPLES_NAME, "is missing", "make or download it again")
    counts = [entry.samples or 0 for entry in manifest.tensors.values()]
    expected = {"index": ("I64", (sum(counts),)), "value": ("F64", (sum(counts),))}
    specs = read_shard(path)
    if {name: (spec.dtype, spec.shape) for name, spec in specs.items()} != expected:
        problem = "does not contain the samples that the manifest lists"
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
