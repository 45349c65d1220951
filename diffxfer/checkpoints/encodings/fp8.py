"""float8 E4M3 weights with scales: by block, by row, or one for the tensor.

DeepSeek-V3 and what came of it name the scales ``weight_scale_inv``; others ``weight_scale``, among
them NVIDIA's Model Optimizer and AMD's Quark. Both are factors: value = code · scale. See
`transformers.integrations.finegrained_fp8`, and
https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.encodings.encoding import Encoding
from diffxfer.checkpoints.encodings.quantization_config import read_quantization, shortened
from diffxfer.checkpoints.encodings.scaled_codes import ScaledCodes
from diffxfer.checkpoints.encodings.scales import grid_of
from diffxfer.checkpoints.quantized import modelopt_algorithm
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.checkpoints.encodings.quantization_config import QuantizationConfig
    from diffxfer.checkpoints.stored import TensorSpec

FORMAT = "fp8 (E4M3) with scales"
METHODS = ("fp8", "fbgemm_fp8")
SUFFIXES = ("_scale_inv", "_scale")
_OF_MODELOPT, _OF_QUARK = ("FP8", "MIXED"), "fp8_e4m3"
"""What Model Optimizer's and Quark's configs say of such weights."""
_PLAIN = ("BF16", "F16", "F32")
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
    scales = {spec.name: _scales_of(spec, tensors) for spec in codes}
    _refuse_lonely_scales(tensors, any(scales.values()))
    if not any(scales.values()) and stated.method not in METHODS:
        return
    if any(scales.values()):
        _refuse_other_format(stated, config, codes[0])
    for spec in codes:
        block = stated.block(spec.shard.path.parent)
        made = spec.name, "F32", spec.shape, spec.shard
        grid = grid_of(spec, spec.shape, _only(scales[spec.name], spec), block)
        yield ScaledCodes(*made, spec, grid, stated.values.get("scale_fmt") == "ue8m0")


def _refuse_other_format(
    stated: QuantizationConfig, config: Mapping[str, Any], example: TensorSpec
) -> None:
    """Refuse what Model Optimizer or Quark have quantised, if they state another format."""
    algorithm, said = modelopt_algorithm(example.shard.path.parent, config), ""
    if algorithm and not any(kind in algorithm for kind in _OF_MODELOPT):
        said = algorithm
    whole = stated.values.get("global_quant_config")
    weight = whole.get("weight") if isinstance(whole, dict) else None
    if stated.method == "quark" and isinstance(weight, dict):
        dtype = weight.get("dtype")
        # A layer may have a format of its own.
        if dtype != _OF_QUARK and not stated.values.get("layer_quant_config"):
            said = f"quark {shortened(dtype)}"
    if said:
        problem = f"{example.name} is stored as {FORMAT}, but its config says {said}"
        raise CheckpointError(example.shard.path, problem, _AGAIN)


def _is_weight(spec: TensorSpec) -> bool:
    return not spec.name.endswith(SUFFIXES)


def _scales_of(spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    return [tensors[spec.name + suffix] for suffix in SUFFIXES if spec.name + suffix in tensors]


def _only(scales: list[TensorSpec], spec: TensorSpec) -> TensorSpec:
    if len(scales) == 1:
        return scales[0]
    found = " and ".join(scale.name for scale in scales) or "no scales"
    problem = f"{spec.name} is F8_E4M3 and has {found}, expected {spec.name}{SUFFIXES[0]}"
    raise CheckpointError(spec.shard.path, problem, _AGAIN)


def _refuse_lonely_scales(tensors: Mapping[str, TensorSpec], scaled: bool) -> None:
    """Refuse scales whose weight is missing, or is not quantised.

    Args:
        tensors: the tensors on disk.
        scaled: whether there are weights with scales; ``weight_scale`` may mean something else
            where there are none.
    """
    for name, scale in tensors.items():
        by_block = name.endswith("_scale_inv")
        if not by_block and not (scaled and name.endswith(".weight_scale")):
            continue
        expected = name.removesuffix("_inv").removesuffix("_scale")
        weight = tensors.get(expected)
        if weight is None or weight.dtype in _PLAIN or (by_block and weight.dtype != "F8_E4M3"):
            found = "is missing" if weight is None else f"is {weight.dtype}"
            problem = f"{name} has no weight: {expected} {found}, expected F8_E4M3"
            raise CheckpointError(scale.shard.path, problem, _AGAIN)


ENCODING = Encoding(FORMAT, find, METHODS)
