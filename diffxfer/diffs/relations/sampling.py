"""Sampling a few thousand elements of whole models, quickly whatever their size.

It chooses a bounded number of tensors, spread over the layers, and reads a few consecutive elements
of each: one small read per tensor. It leaves out vocabulary tensors, because rows of tokens may
have moved, and vectors, because those of norms are near 1 in any model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from diffxfer.checkpoints.files import OpenShard, one_at_a_time
from diffxfer.checkpoints.stored import BITS, Files
from diffxfer.checkpoints.values import elements, in_float64
from diffxfer.diffs.artifact.samples import read_samples, sample_indices, samples_per_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.matching.match import Difference

Values = npt.NDArray[np.float64]

_MOST_TENSORS = 512
_FEW_TENSORS, _FEW_SAMPLES = 64, 1500
"""Enough for a verdict if every tensor takes a separate request to the Hub."""
_AT_A_TIME = 8
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """The same elements of one tensor in every role.

    Attributes:
        name: the tensor's name.
        values: the elements by role, each of shape `(samples,)`.
    """

    name: str
    values: Mapping[str, Values]

    @property
    def layer(self) -> str:
        """The name up to and including its first number; empty if it has none."""
        found = _LAYER.match(self.name)
        return found[0] if found else ""


def sample_models(
    pairs: Sequence[tuple[Difference, StoredTensor | None]], roles: Sequence[str]
) -> list[Sample]:
    """Sample checkpoints.

    Args:
        pairs: differences of finetuned and base, each with the target's tensor, or None.
        roles: the roles of the tensors: finetuned, base, and target if there is one.

    Returns:
        A sample of each chosen tensor.

    Raises:
        CheckpointError: if one cannot be read.
    """
    specs = {
        difference.name: tuple(spec for spec in (*difference.sources, target) if spec is not None)
        for difference, target in pairs
        if _is_telling(difference)
    }
    chosen = _few(_spread(specs), specs, dict.fromkeys(specs, samples_per_tensor(_FEW_TENSORS)))
    count = samples_per_tensor(len(chosen))
    wanted = [
        (spec, np.array(sample_indices(name, spec.elements, count), np.int64))
        for name in chosen
        for spec in specs[name]
    ]
    return _by_role(chosen, roles, read_elements(wanted))


def sample_graft(
    pairs: Iterable[tuple[Difference, StoredTensor]], folder: Path, manifest: Manifest
) -> list[Sample]:
    """Sample a target and a diff vector at the elements of base that the diff vector stores.

    Args:
        pairs: the tensors of the diff vector, each with the target's tensor.
        folder: the diff vector.
        manifest: its manifest.

    Returns:
        A sample of each chosen tensor; finetuned's values are base + Δ.

    Raises:
        ArtifactError: if the samples of base are not what the manifest says.
        CheckpointError: if a tensor cannot be read.
    """
    known = read_samples(folder, manifest)
    specs = {
        difference.name: (difference.sources[0], target)
        for difference, target in pairs
        if _is_telling(difference) and _lie_within(known[difference.name][0], target)
    }
    chosen = _few(_spread(specs), specs, {name: len(known[name][0]) for name in specs})
    wanted = [(spec, known[name][0]) for name in chosen for spec in specs[name]]
    found = _by_role(chosen, ("delta", "target"), read_elements(wanted))
    samples = []
    for sample in found:
        base = known[sample.name][1]
        roles = {"base": base, "finetuned": base + sample.values["delta"]}
        samples.append(Sample(sample.name, {**roles, "target": sample.values["target"]}))
    return samples


def _is_telling(difference: Difference) -> bool:
    shape = difference.shape
    return len(shape) > 1 and 0 not in shape and not difference.vocabulary


def _lie_within(indices: npt.NDArray[np.int64], spec: StoredTensor) -> bool:
    return bool(len(indices)) and bool(((indices >= 0) & (indices < spec.elements)).all())


def _spread(names: Iterable[str]) -> list[str]:
    """A bounded number of names, spread evenly over layers, in pseudo-random order within each."""
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: xxhash.xxh3_64_intdigest(name.encode())):
        layers[Sample(name, {}).layer].append(name)
    turns = chain.from_iterable(zip_longest(*(layers[layer] for layer in sorted(layers))))
    return [name for name in turns if name is not None][:_MOST_TENSORS]


def _few(
    names: Sequence[str],
    specs: Mapping[str, Sequence[StoredTensor]],
    samples: Mapping[str, int],
) -> Sequence[str]:
    """The names, cut to as many as a verdict needs if some shards are only on the Hub."""
    shards = {spec.shard.path: spec.shard for name in names for spec in specs[name]}
    if not any(shard.away for shard in shards.values()):
        return names
    count = 0
    for place, name in enumerate(names):
        if place >= _FEW_TENSORS and count >= _FEW_SAMPLES:
            return names[:place]
        count += samples[name]
    return names


def _by_role(names: Sequence[str], roles: Sequence[str], found: Sequence[Values]) -> list[Sample]:
    width = len(roles)
    return [
        Sample(name, dict(zip(roles, found[place * width :], strict=False)))
        for place, name in enumerate(names)
    ]


def read_elements(wanted: Sequence[tuple[StoredTensor, npt.NDArray[np.int64]]]) -> list[Values]:
    """Read some elements of some tensors.

    Args:
        wanted: float tensors, each with ascending flat indices.

    Returns:
        Their values, each of shape `(indices,)`.

    Raises:
        CheckpointError: if one cannot be read.
        HubError: if one cannot be fetched from the Hub.
    """
    far = [place for place, (stored, _) in enumerate(wanted) if stored.shard.away]
    found = dict(zip(far, _read_far([wanted[place] for place in far]), strict=True))
    order = sorted(range(len(wanted)), key=lambda place: (wanted[place][0].shard.path, place))
    files = one_at_a_time()
    for place in order:  # shard by shard, so that only one is open at a time
        if place not in found:
            found[place] = _elements(files, *wanted[place])
    return [found[place] for place in range(len(wanted))]


def _read_far(wanted: Sequence[tuple[StoredTensor, npt.NDArray[np.int64]]]) -> list[Values]:
    """Read elements from the Hub, several requests at a time."""
    parts = [part for stored, _ in wanted for part in stored.parts]
    shards = {part.shard.path: OpenShard(part.shard) for part in parts}

    def read(item: tuple[StoredTensor, npt.NDArray[np.int64]]) -> Values:
        return _elements(Files(lambda shard: shards[shard.path]), *item)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(read, wanted))


def _elements(files: Files, stored: StoredTensor, indices: npt.NDArray[np.int64]) -> Values:
    size = BITS[stored.dtype] // 8
    raw = memoryview(bytearray(len(indices) * size))
    edges = np.flatnonzero(np.diff(indices) != 1) + 1
    done = 0
    for part in np.split(indices, edges):
        if len(part):
            stored.read(files, int(part[0]), raw[done : done + len(part) * size])
            done += len(part) * size
    return in_float64(elements(raw, stored.dtype), stored.dtype)
