"""Decoded values are those of the libraries that define the formats, bit for bit in float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.stored import Files
from tests import tiny
from tests.checkpoints.encodings import make_bitsandbytes
from tests.checkpoints.encodings.codings import FP8, compressed, pack

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor

UP = "model.layers.0.mlp.up_proj.weight"


def opened(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Any:
    """The tensors of a checkpoint."""
    weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tiny.save_model(folder, weights, config={**tiny.CONFIG, **config})
    return open_checkpoint(folder, "base").tensors


def read(stored: StoredTensor, start: int, count: int) -> np.ndarray[Any, Any]:
    """Some values, as integers, so that −0.0 is not 0.0."""
    buffer = bytearray(4 * count)
    stored.read(one_at_a_time(), start, memoryview(buffer))
    return np.frombuffer(buffer, np.uint32)


def check(stored: StoredTensor, expected: torch.Tensor) -> None:
    """Compare all values, and those of reads that begin and end anywhere."""
    assert (stored.dtype, stored.shape) == ("F32", tuple(expected.shape))
    assert stored.written_dtype == "BF16"
    bits = expected.float().contiguous().reshape(-1).numpy().view(np.uint32)
    assert np.array_equal(read(stored, 0, len(bits)), bits)
    check_in_part(stored, bits)


def check_in_part(stored: StoredTensor, bits: np.ndarray[Any, Any]) -> None:
    size, width = len(bits), stored.shape[-1]
    parts = [(0, 1), (1, 5), (size - 1, 1), (size - 8, 7), (width - 1, 2), (width * 2 + 3, width)]
    rng = np.random.default_rng(1)
    for start in map(int, rng.integers(0, size, 40)):
        parts.append((start, int(rng.integers(1, size - start + 1))))
    for start, count in parts:
        assert np.array_equal(read(stored, start, count), bits[start : start + count]), start


# compressed-tensors.

EIGHT = {"num_bits": 8, "type": "float"}
FOUR = {"num_bits": 4, "type": "int"}
CASES = [
    ("float-quantized", {**EIGHT, "strategy": "tensor"}, (70, 96)),
    ("float-quantized", {**EIGHT, "strategy": "channel"}, (70, 97)),
    ("float-quantized", {**EIGHT, "strategy": "block", "block_structure": [32, 16]}, (70, 90)),
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (70, 97)),
    (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        (70, 97),
    ),
    ("pack-quantized", {**FOUR, "strategy": "group", "group_size": 32}, (70, 96)),
    (
        "pack-quantized",
        {**FOUR, "strategy": "group", "group_size": 16, "symmetric": False},
        (70, 96),
    ),
    ("pack-quantized", {**FOUR, "strategy": "channel"}, (70, 99)),
    ("pack-quantized", {**FOUR, "strategy": "channel", "symmetric": False}, (71, 99)),
    (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        (70, 96),
    ),
    (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
        (70, 96),
    ),
    (
        "mxfp8-quantized",
        {**EIGHT, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        (70, 96),
    ),
]


@pytest.mark.parametrize(("kind", "stated", "shape"), CASES)
def test_compressed_tensors(
    tmp_path: Path, kind: str, stated: dict[str, Any], shape: tuple[int, int]
) -> None:
    pytest.importorskip("compressed_tensors")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    parts, config, expected = compress(kind, stated, values)
    found = opened(tmp_path / "model", parts, config)
    assert list(found) == [UP]
    check(found[UP], expected)


def compress(
    kind: str, stated: dict[str, Any], values: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]:
    """The parts of a matrix as the library stores it, the config, and what it decodes to."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**{"symmetric": True, **stated})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    library = BaseCompressor.get_value_from_registry(kind)
    low, high = extremes(values, stated)
    shared = None
    if kind.startswith("nvfp4"):
        shared = generate_gparam(low.min().reshape(1), high.max().reshape(1))
    given = {} if shared is None else {"global_scale": shared}
    scale, zero = calculate_qparams(low, high, args, **given)
    parts = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    parts |= {} if shared is None else {"weight_global_scale": shared}
    made = library.compress(parts, scheme)
    expected = decoded(library, made, scheme, (values.shape[0], values.shape[1]))
    prefix = UP.removesuffix("weight")
    named = {prefix + name: tensor for name, tensor in made.items()}
    return named, compressed(kind, **args.model_dump(mode="json")), expected


def extremes(values: torch.Tensor, stated: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of each block."""
    if stated["strategy"] == "tensor":
        return values.min().reshape(1), values.max().reshape(1)
    if stated["strategy"] == "channel":
        return values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    rows, columns = stated.get("block_structure", (1, stated.get("group_size")))
    height, width = (math.ceil(n / b) for n, b in zip(values.shape, (rows, columns), strict=True))
    padded = torch.zeros(height * rows, width * columns)
    padded[: values.shape[0], : values.shape[1]] = values
    grid = padded.reshape(height, rows, width, columns)
    return grid.amin((1, 3)), grid.amax((1, 3))


def decoded(library: Any, made: dict[str, Any], scheme: Any, shape: tuple[int, int]) -> Any:
    """What the library decodes to if it is not made to round to 16 bits."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    shared = made.get("weight_global_scale")
    if shared is not None:
        return dequantize(
            x_q=unpack_fp4_from_uint8(made["weight_packed"], *shape, dtype=torch.float32),
            scale=made["weight_scale"].float(),
            args=scheme.weights,
            global_scale=shared,
            dtype=torch.float32,
        )
    scale = made["weight_scale"]
    wide = scale.float() if scale.dtype in (torch.bfloat16, torch.float16) else scale
    return library.decompress({**made, "weight_scale": wide}, scheme)["weight"].float()


def test_groups_of_several_sizes(tmp_path: Path) -> None:
    """The config has two sizes; which one a weight has is shown by its parts."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (4, 96), generator=generator)
    config = compressed("pack-quantized", num_bits=4, type="int", group_size=32)
    other = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 16}}
    config["quantization_config"]["config_groups"]["group_1"] = other
    parts = {UP + "_packed": pack(codes), UP + "_shape": torch.tensor([4, 96])}
    for size in (16, 32):
        scale = torch.rand(4, 96 // size, generator=generator) + 0.1
        found = opened(tmp_path / str(size), {**parts, UP + "_scale": scale}, config)
        check(found[UP], (codes.float() - 8) * scale.repeat_interleave(size, 1))


# transformers.


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(256, 128), (3, 256, 128)])
def test_fp8_of_transformers(tmp_path: Path, scale_fmt: str | None, shape: tuple[int, ...]) -> None:
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    said: dict[str, Any] = {"weight_block_size": [64, 32], "scale_fmt": scale_fmt}
    quantizer: Any = SimpleNamespace(quantization_config=SimpleNamespace(**said))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    values[..., :64, :32] = 0
    made = Fp8Quantize(quantizer).convert({UP: values})
    expected = Fp8Dequantize(quantizer)._dequantize_one(
        made[UP], made[UP + "_scale_inv"], torch.float32
    )
    config = {"quantization_config": {"quant_method": "fp8", **said}}
    check(opened(tmp_path / "model", made, config)[UP], expected)


def test_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 96, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 240, (3, 96, 4), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    check(opened(tmp_path / "model", parts, config)[name], expected)


# bitsandbytes: see make_bitsandbytes.


def test_bitsandbytes(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    found = opened(tmp_path / "model", load_file(make_bitsandbytes.FILE), config)
    with safe_open(make_bitsandbytes.FILE, "pt") as file:
        digests = file.metadata()
    assert found.keys() == digests.keys()
    for name, stored in found.items():
        bits = read(stored, 0, stored.elements)
        values = torch.from_numpy(bits.copy().view(np.float32))
        assert make_bitsandbytes.digest(values) == digests[name], name
        assert stored.written_dtype == "BF16"
        check_in_part(stored, bits)


# What is read.


def test_some_rows_need_only_their_codes_and_scales(tmp_path: Path) -> None:
    """In a matrix of 1,000 rows: a read of row 300 to 301, in blocks of 128 rows."""
    values = torch.randn(1000, 512, generator=torch.Generator().manual_seed(3))
    stored = opened(tmp_path / "model", FP8.encode({UP: values}), FP8.config)[UP]
    codes, scales = stored.parts
    asked: list[tuple[int, int]] = []

    class Recorded:
        def read_into(self, buffer: memoryview, offset: int) -> None:
            asked.append((offset, len(buffer)))
            with codes.shard.path.open("rb") as file:
                file.seek(offset)
                buffer[:] = file.read(len(buffer))

    buffer = bytearray(4 * 512 * 2)
    stored.read(Files(lambda _: Recorded()), 300 * 512, memoryview(buffer))
    assert sorted(asked) == sorted(
        [(codes.start + 300 * 512, 2 * 512), (scales.start + 2 * 16, 16)]
    )
    assert np.array_equal(np.frombuffer(buffer, np.uint32), read(stored, 300 * 512, 1024))
