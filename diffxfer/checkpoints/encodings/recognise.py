"""Which tensors of a checkpoint are encoded, and how."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.encodings import bitsandbytes, compressed_tensors, fp8, gpt_oss
from diffxfer.checkpoints.encodings.quantization_config import read_quantization
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.encodings.encoding import Encoding
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.checkpoints.weights import Weights


ENCODINGS: tuple[Encoding, ...] = (
    compressed_tensors.ENCODING,
    fp8.ENCODING,
    gpt_oss.ENCODING,
    bitsandbytes.ENCODING,
)
"""Every encoding that can be read, in the order in which they are tried."""

_AGAIN = "download or save it again"
_REMEDY = "if its weights are not quantised, remove quantization_config from config.json"
_OF_ACTIVATIONS = re.compile(
    r"\.(input|output|k|v|q|prob|activation|input_activation|output_activation|input_global)_scale$"
    r"|_activation_scale$|\.(input|output)_zero_point$"
)
"""Scales by which activations are quantised at run time: no weight depends on them."""


def decoded(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """Replace the parts of encoded tensors by the tensors that they encode.

    Args:
        weights: the tensors of a folder as they are on disk.
        config: its ``config.json``.

    Returns:
        The same weights with every tensor of the model, in the order of the files, and the formats
        that were found. Tensors that belong to no encoding stay as they are.

    Raises:
        CheckpointError: if an encoded tensor lacks a part, a part has a wrong shape or dtype, or
            the config describes another format.
    """
    rest = dict(weights.on_disk)
    first_part: dict[str, StoredTensor] = {}
    formats = []
    for encoding in ENCODINGS:
        found = list(encoding.find(config, rest))
        if found:
            formats.append(encoding.format)
            _refuse_disagreement(config, encoding, found[0])
        for stored in found:
            first_part[stored.parts[0].name] = stored
            for part in stored.parts:
                if rest.pop(part.name, None) is None:
                    problem = f"{part.name} belongs to two quantised tensors"
                    raise CheckpointError(part.shard.path, problem, _AGAIN)
    if not formats:
        _refuse_none(config, weights)
        return weights
    rest = {name: spec for name, spec in rest.items() if not _OF_ACTIVATIONS.search(name)}
    tensors: dict[str, StoredTensor] = {}
    for name in weights.on_disk:
        stored_here = first_part.get(name, rest.get(name))
        if stored_here is None:
            continue
        if stored_here.name in tensors:
            problem = f"has {stored_here.name} twice, once quantised and once not"
            raise CheckpointError(stored_here.shard.path, problem, _AGAIN)
        tensors[stored_here.name] = stored_here
    return replace(weights, tensors=tensors, formats=tuple(formats))


def _methods() -> set[str]:
    return {method for encoding in ENCODINGS for method in encoding.methods}


def _refuse_disagreement(
    config: Mapping[str, Any], encoding: Encoding, example: StoredTensor
) -> None:
    """Refuse tensors of another format than the config describes."""
    method = read_quantization(config).method
    if method in _methods() and encoding.methods and method not in encoding.methods:
        part = example.parts[0]
        problem = f"{part.name} is stored as {encoding.format}, but config.json says {method}"
        raise CheckpointError(part.shard.path, problem, _AGAIN)


def _refuse_none(config: Mapping[str, Any], weights: Weights) -> None:
    """Refuse a config that describes a format in which no tensor is stored."""
    method = read_quantization(config).method
    if method in _methods():
        problem = f"has no tensor that is stored as {method}, but config.json says so"
        code = next((s for s in weights.on_disk.values() if s.dtype not in FLOATS), None)
        if code is None:
            raise CheckpointError(weights.folder, problem, _REMEDY)
        problem = f"{problem}: {code.name} is {code.dtype} {code.shape}"
        raise CheckpointError(weights.folder, problem, _AGAIN)
