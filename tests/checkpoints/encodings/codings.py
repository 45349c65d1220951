"""Formats of quantised weights, written and read with PyTorch alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diffxfer.checkpoints.encodings import bitsandbytes, compressed_tensors, fp8
from tests.checkpoints.encodings import scaled_halves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from diffxfer.checkpoints.encodings.encoding import Encoding

    Tensors = Mapping[str, Tensor]

NF4 = torch.tensor(list(bitsandbytes._NF4))
BLOCK = 128


@dataclass(frozen=True)
class Coding:
    """How a matrix becomes parts, and what their values are.

    Attributes:
        name: of the test.
        ENCODING: the encoding that reads it.
        parts: from a matrix to parts by suffix; the first one decides the place.
        values: from the same parts to the matrix, in float32.
        config: what ``config.json`` says of it.
    """

    name: str
    ENCODING: Encoding
    parts: Callable[[Tensor], dict[str, Tensor]]
    values: Callable[[dict[str, Tensor]], Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        """Encode every matrix."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = self.parts(tensor.float()) if tensor.dim() > 1 else {"": tensor}
            found |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
        return found

    def decode(self, tensors: Tensors) -> dict[str, Tensor]:
        """The values of encoded tensors, as plain float32."""
        suffixes = list(self.parts(torch.ones(2, 2)))
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            weight = name.partition(".weight")[0] + ".weight"
            parts = {s: tensors[weight + s] for s in suffixes if weight + s in tensors}
            if len(parts) < len(suffixes):
                found[name] = tensor
            elif name == weight + suffixes[0]:
                found[weight] = self.values(parts)
        return found


def blocks(scale: Tensor, shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """One scale for each value."""
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: shape[0], : shape[1]]


def _padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    made = torch.zeros(-(-tensor.shape[0] // rows) * rows, -(-tensor.shape[1] // columns) * columns)
    made[: tensor.shape[0], : tensor.shape[1]] = tensor
    return made


def fp8_parts(tensor: Tensor) -> dict[str, Tensor]:
    padded = _padded(tensor, BLOCK, BLOCK)
    grid = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = grid.abs().amax((1, 3)).clamp(min=1e-4) / 448
    codes = tensor / blocks(scale, tuple(tensor.shape), BLOCK, BLOCK)
    return {"": codes.to(torch.float8_e4m3fn), "_scale_inv": scale}


def fp8_values(parts: dict[str, Tensor]) -> Tensor:
    codes = parts[""].float()
    return codes * blocks(parts["_scale_inv"], tuple(codes.shape), BLOCK, BLOCK)


def pack(codes: Tensor) -> Tensor:
    """Eight codes to an int32, row by row, the first one lowest."""
    rows, columns = codes.shape
    words = _padded(codes.float(), 1, 8).long().reshape(rows, -(-columns // 8), 8)
    packed = sum(words[:, :, place] << (4 * place) for place in range(8))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def unpack(words: Tensor, columns: int) -> Tensor:
    """The codes of `pack`."""
    places = torch.arange(8) * 4
    codes = (words.long()[:, :, None] >> places) & 15
    return codes.reshape(len(words), -1)[:, :columns].float()


def int4_parts(tensor: Tensor) -> dict[str, Tensor]:
    scale = tensor.abs().amax(1, keepdim=True) / 7
    codes = (tensor / scale).round().clamp(-8, 7) + 8
    return {"_packed": pack(codes), "_scale": scale, "_shape": torch.tensor(tensor.shape)}


def int4_values(parts: dict[str, Tensor]) -> Tensor:
    return (unpack(parts["_packed"], int(parts["_shape"][1])) - 8) * parts["_scale"]


def int8_parts(tensor: Tensor) -> dict[str, Tensor]:
    low, high = tensor.amin(1, keepdim=True), tensor.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-3) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    codes = (tensor / scale + zero).round().clamp(-128, 127)
    return {"": codes.to(torch.int8), "_scale": scale, "_zero_point": zero.to(torch.int8)}


def int8_values(parts: dict[str, Tensor]) -> Tensor:
    return (parts[""].float() - parts["_zero_point"].float()) * parts["_scale"]


def nf4_parts(tensor: Tensor) -> dict[str, Tensor]:
    flat = torch.nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % 64)).reshape(-1, 64)
    absmax = flat.abs().amax(1)
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = torch.bucketize(flat / absmax[:, None].clamp(min=1e-9), middles)
    codes = codes.reshape(-1)[: tensor.numel() + tensor.numel() % 2].reshape(-1, 2)
    told = {"blocksize": 64, "shape": list(tensor.shape), "quant_type": "nf4", "dtype": "bfloat16"}
    return {
        "": (codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8),
        ".absmax": absmax,
        ".quant_map": NF4.clone(),
        ".quant_state.bitsandbytes__nf4": bytes_of(told),
    }


def nf4_values(parts: dict[str, Tensor]) -> Tensor:
    told = json.loads(bytes(parts[".quant_state.bitsandbytes__nf4"].tolist()))
    codes = torch.cat([parts[""] >> 4, parts[""] & 15], 1).reshape(-1)
    scales = parts[".absmax"].repeat_interleave(64)[: len(codes)]
    values = parts[".quant_map"][codes.long()] * scales
    return values[: math.prod(told["shape"])].reshape(told["shape"])


def nf4_double_parts(tensor: Tensor) -> dict[str, Tensor]:
    """With scales that are codes themselves, four to a block."""
    parts = nf4_parts(tensor)
    absmax = parts[".absmax"]
    offset = absmax.mean()
    padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 4)).reshape(-1, 4)
    outer = padded.abs().amax(1).clamp(min=1e-4)
    values = torch.linspace(-1, 1, 256)
    codes = ((padded / outer[:, None] + 1) * 127.5).round()
    told = {"nested_blocksize": 4, "nested_offset": float(offset), "blocksize": 64}
    return {
        **parts,
        ".absmax": codes.reshape(-1)[: len(absmax)].to(torch.uint8),
        ".nested_absmax": outer,
        ".nested_quant_map": values,
        ".quant_state.bitsandbytes__nf4": bytes_of({**told, "shape": list(tensor.shape)}),
    }


def nf4_double_values(parts: dict[str, Tensor]) -> Tensor:
    told = json.loads(bytes(parts[".quant_state.bitsandbytes__nf4"].tolist()))
    codes = parts[".absmax"]
    outer = parts[".nested_absmax"].repeat_interleave(4)[: len(codes)]
    absmax = parts[".nested_quant_map"][codes.long()] * outer + told["nested_offset"]
    return nf4_values({**parts, ".absmax": absmax})


def bytes_of(value: Any) -> Tensor:
    """JSON as a tensor, as bitsandbytes stores its description."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    """The config of a model of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights}
    stated = {"quant_method": "compressed-tensors", "format": kind}
    return {"quantization_config": {**stated, "config_groups": {"group_0": group}}}


FP8 = Coding(
    "fp8",
    fp8.ENCODING,
    fp8_parts,
    fp8_values,
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}},
)
INT4 = Coding(
    "int4",
    compressed_tensors.ENCODING,
    int4_parts,
    int4_values,
    compressed("pack-quantized", num_bits=4, type="int", strategy="channel", symmetric=True),
)
INT8 = Coding(
    "int8",
    compressed_tensors.ENCODING,
    int8_parts,
    int8_values,
    compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
)
NF4_BLOCKS = Coding(
    "nf4",
    bitsandbytes.ENCODING,
    nf4_parts,
    nf4_values,
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
)
NF4_DOUBLE = Coding(
    "nf4-double",
    bitsandbytes.ENCODING,
    nf4_double_parts,
    nf4_double_values,
    {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True}},
)


def _half_parts(tensor: Tensor) -> dict[str, Tensor]:
    made = scaled_halves.encode({"x": tensor})
    return {name.removeprefix("x"): part for name, part in made.items()}


HALVES = Coding(
    "halves",
    scaled_halves.ENCODING,
    _half_parts,
    lambda parts: parts[""].float() * parts[scaled_halves.SUFFIX],
)
