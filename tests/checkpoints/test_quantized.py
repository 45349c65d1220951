"""Quantised checkpoints are refused with the format's name; others are not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.checkpoints.quantized import refuse_quantized
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.errors import QuantizedError
from tests.helpers import raw_shard

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint


def checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, str]) -> Checkpoint:
    """Open a checkpoint of tensors of one byte an element, or eight elements a tensor."""
    bits = {"F8_E4M3": 8, "F8_E5M2": 8, "U8": 8, "I8": 8, "BOOL": 8, "F4": 4, "F6_E2M3": 6}
    bits |= {"I32": 32, "U32": 32, "I16": 16, "U16": 16, "BF16": 16, "F32": 32, "I64": 64}
    header, end = {}, 0
    for name, dtype in tensors.items():
        size = bits[dtype]
        header[name] = {"dtype": dtype, "shape": [8], "data_offsets": [end, end + size]}
        end += size
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(raw_shard(header, b"\0" * end))
    return open_checkpoint(folder, "base")


PLAIN = {"model.layers.0.mlp.weight": "BF16"}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "FP8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"quantization_config": {"group_size": 32, "bits": 8, "mode": "affine"}}, "MLX, 8 bits"),
    ],
)
def test_a_config_tells(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    with pytest.raises(
        QuantizedError, match=rf"is quantised \({name}, according to its config.json\)"
    ):
        checkpoint(tmp_path, config, PLAIN)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization": "none"},
        {"text_config": {"hidden_size": 4}, "vision_config": None},
    ],
)
def test_a_config_that_only_mentions_it_does_not(tmp_path: Path, config: dict[str, Any]) -> None:
    assert checkpoint(tmp_path, config, PLAIN).tensors.keys() == PLAIN.keys()


@pytest.mark.parametrize(
    "name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
)
def test_a_file_tells(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(QuantizedError, match=rf"is quantised \(it has {name}\)"):
        checkpoint(tmp_path, {}, PLAIN)


@pytest.mark.parametrize(
    ("tensors", "name", "culprit"),
    [
        ({"a.weight": "F8_E4M3"}, "F8_E4M3 elements", "a.weight"),
        ({"a.weight": "F8_E5M2", "a.weight_scale": "F32"}, "F8_E5M2 elements", "a.weight"),
        ({"a": "F4"}, "F4 elements", "a"),
        ({"a": "F6_E2M3"}, "F6_E2M3 elements", "a"),
        ({"a.weight": "I8"}, "I8 weights", "a.weight"),
        ({"a.weight": "U8"}, "U8 weights", "a.weight"),
        ({"a.weight": "I32"}, "I32 weights", "a.weight"),
        ({"a.qweight": "I32"}, "GPTQ or AWQ", "a.qweight"),
        ({"a.qzeros": "I32"}, "GPTQ or AWQ", "a.qzeros"),
        ({"a.g_idx": "I32"}, "GPTQ or AWQ", "a.g_idx"),
        ({"a.weight_packed": "I32"}, "compressed-tensors", "a.weight_packed"),
        ({"a.weight.absmax": "F32"}, "bitsandbytes", "a.weight.absmax"),
        ({"a.weight.quant_map": "F32"}, "bitsandbytes", "a.weight.quant_map"),
    ],
)
def test_a_tensor_tells(tmp_path: Path, tensors: dict[str, str], name: str, culprit: str) -> None:
    with pytest.raises(QuantizedError) as caught:
        checkpoint(tmp_path, {}, PLAIN | tensors)
    assert f"is quantised ({name}, according to its tensor {culprit})" in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"transformer_blocks": "BF16"},
        {"position_ids": "I64", "mask": "BOOL", "num_batches_tracked": "I64"},
        {"a.weight_scale": "F32"},
        {"layers.g_idx.bias": "F32"},
        {"token_ids": "I32"},
    ],
)
def test_other_tensors_do_not(tmp_path: Path, tensors: dict[str, str]) -> None:
    found = checkpoint(tmp_path, {}, PLAIN | tensors)
    refuse_quantized(found.folder, found.config, found.weights)
