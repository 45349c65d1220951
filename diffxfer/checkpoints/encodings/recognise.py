"""Which tensors of a checkpoint are encoded, and how."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.encodings import bitsandbytes, compressed_tensors, fp8, gpt_oss

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

_OF_ACTIVATIONS = re.compile(
    r"\.(input|output|k|v|q|prob|activation|input_activation|output_activation|input_global)_scale$"
    r"|_activation_scale$|\.(input|output)_zero_point$|\.weight_format$"
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
        CheckpointError: if an encoded tensor lacks a part, or a part has a wrong shape or dtype.
    """
    rest = dict(weights.on_disk)
    first_part: dict[str, StoredTensor] = {}
    formats = []
    for encoding in ENCODINGS:
        found = list(encoding.find(config, rest))
        if found:
            formats.append(encoding.format)
        for stored in found:
            first_part[stored.parts[0].name] = stored
            for part in stored.parts:
                assert part.name in rest, f"{encoding.format} uses {part.name} twice"
                del rest[part.name]
    if not formats:
        return weights
    rest = {name: spec for name, spec in rest.items() if not _OF_ACTIVATIONS.search(name)}
    tensors: dict[str, StoredTensor] = {}
    for name in weights.on_disk:
        stored_here = first_part.get(name, rest.get(name))
        if stored_here is not None:
            tensors[stored_here.name] = stored_here
    return replace(weights, tensors=tensors, formats=tuple(formats))
