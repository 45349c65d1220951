"""Recognising quantised checkpoints, whose stored codes cannot be subtracted."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import optional_object
from diffxfer.errors import QuantizedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.checkpoints.weights import Weights

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of ``config.json``, or of a part of it, that describe how weights are quantised."""
MODELOPT_FILE = "hf_quant_config.json"
CONFIG_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
"""Files that describe the same."""

_KEY_FORMATS = (
    (re.compile(r"\.weight_scale_inv$"), "fp8 with block scales"),
    (re.compile(r"_blocks$"), "mxfp4"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.weight\.(absmax|quant_map|quant_state\..+)$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
)
_CODES = frozenset({"I8", "U8", "I32", "U32", "I16", "U16"})
_REMEDY = "use the checkpoint in its full precision; quantise the graft afterwards"


def refuse_quantized(folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Refuse a checkpoint that is quantised in a way that no encoding reads.

    Args:
        folder: the checkpoint.
        config: its config.json.
        weights: its tensors, decoded where an encoding was found.

    Raises:
        QuantizedError: if its config, files or tensor names show such a format; it names the
            format.
    """
    if not weights.formats:
        _refuse_by_config(folder, config)
    tensors = weights.tensors
    for name, spec in tensors.items():
        method = _method_of(name, spec, tensors)
        if method:
            problem = f"is quantised ({method}, according to its tensor {name})"
            raise QuantizedError(spec.shard.path, problem, _REMEDY)


def _refuse_by_config(folder: Path, config: Mapping[str, Any]) -> None:
    method = _method_in(config) or next(
        (_method_in(sub) for sub in config.values() if isinstance(sub, dict) and _method_in(sub)),
        None,
    )
    if method:
        raise QuantizedError(
            folder, f"is quantised ({method}, according to its config.json)", _REMEDY
        )
    for name in CONFIG_FILES:
        if os.path.lexists(folder / name):
            algorithm = modelopt_algorithm(folder, config) if name == MODELOPT_FILE else ""
            told = f"{algorithm}, according to its {name}" if algorithm else f"it has {name}"
            raise QuantizedError(folder, f"is quantised ({told})", _REMEDY)


def modelopt_algorithm(folder: Path, config: Mapping[str, Any]) -> str:
    """How NVIDIA's Model Optimizer has quantised a checkpoint, such as ``"modelopt NVFP4"``.

    Args:
        folder: the checkpoint.
        config: its config.json, or another one that may say it.

    Returns:
        Its algorithm; empty if none is stated.
    """
    parts = [config.get(key) for key in CONFIG_KEYS]
    if os.path.lexists(folder / MODELOPT_FILE):
        parts.append(optional_object(folder, MODELOPT_FILE).get("quantization"))
    for part in parts:
        algorithm = part.get("quant_algo") if isinstance(part, dict) else None
        if isinstance(algorithm, str) and algorithm:
            return f"modelopt {algorithm.upper()}"[:40]
    return ""


def _method_in(config: Mapping[str, Any]) -> str | None:
    for key in CONFIG_KEYS:
        found = config.get(key)
        if isinstance(found, dict) and found:
            stated = (found.get("quant_method"), found.get("quant_algo"))
            method = " ".join(str(each) for each in stated if each)
            if not method and {"bits", "group_size"} <= found.keys():
                method = f"MLX, {found['bits']} bits"
            return str(method or key)[:40]
    return None


def _method_of(name: str, spec: StoredTensor, tensors: Mapping[str, StoredTensor]) -> str | None:
    for pattern, method in _KEY_FORMATS:
        if not pattern.search(name):
            continue
        if method == "mxfp4" and name[: -len("_blocks")] + "_scales" not in tensors:
            continue
        return method
    if spec.dtype.startswith(("F8", "F6_", "F4")):
        return f"{spec.dtype} elements"
    if spec.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in tensors:
        return "MLX"
    if spec.dtype in _CODES and name.endswith("weight"):
        return f"{spec.dtype} weights"
    return None
