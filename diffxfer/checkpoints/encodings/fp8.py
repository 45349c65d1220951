"""float8 E4M3 weights with scales: by block, by row, or one for the tensor.

DeepSeek-V3 and what came of it name the scales ``weight_scale_inv``; others ``weight_scale``. Both
are factors: value = code · scale. See `transformers.integrations.finegrained_fp8`, and
https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.encodings.encoding import Encoding
from diffxfer.checkpoints.encodings.quantization_config import read_quantization
from diffxfer.checkpoints.encodings.scaled_codes import ScaledCodes
from diffxfer.checkpoints.encodings.scales import grid_of
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.checkpoints.stored import TensorSpec

FORMAT = "fp8 (E4M3) with scales"
SUFFIXES = ("_scale_inv", "_scale")
_AGAIN = "download or save it again"


def find(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Iterator[ScaledCodes]:
    """Find the float8 weights, and their scales.

    Raises:
        CheckpointError: if a weight lacks its scales, scales belong to no float8 weight, or their
            shape does not fit.
    """
    stated = read_quantization(config)
    if stated.method == "compressed-tensors":
        return
    codes = [spec for spec in tensors.values() if spec.dtype == "F8_E4M3" and _is_weight(spec)]
    scales = {spec.name: _scale_of(spec, tensors) for spec in codes}
    if not any(scales.values()):
        return
    _refuse_lonely_scales(tensors)
    for spec in codes:
        scale = scales[spec.name]
        if scale is None:
            problem = f"{spec.name} is F8_E4M3 and has no scales, expected {spec.name}{SUFFIXES[0]}"
            raise CheckpointError(spec.shard.path, problem, _AGAIN)
        grid = grid_of(spec, spec.shape, scale, stated.block)
        made = spec.name, "F32", spec.shape, spec.shard
        yield ScaledCodes(*made, spec, grid, stated.values.get("scale_fmt") == "ue8m0")


def _is_weight(spec: TensorSpec) -> bool:
    return not spec.name.endswith(SUFFIXES)


def _scale_of(spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    return next((tensors[n] for s in SUFFIXES if (n := spec.name + s) in tensors), None)


def _refuse_lonely_scales(tensors: Mapping[str, TensorSpec]) -> None:
    for name, scale in tensors.items():
        if not name.endswith("_scale_inv"):
            continue
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if weight is None or weight.dtype != "F8_E4M3":
            found = "is missing" if weight is None else f"is {weight.dtype}"
            expected = name.removesuffix("_scale_inv")
            problem = f"{name} has no weight: {expected} {found}, expected F8_E4M3"
            raise CheckpointError(scale.shard.path, problem, _AGAIN)


ENCODING = Encoding(FORMAT, find)
