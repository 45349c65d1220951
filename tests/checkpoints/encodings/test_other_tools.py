"""Checkpoints of NVIDIA's Model Optimizer and AMD's Quark: read, or refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.errors import CheckpointError, QuantizedError
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CONFIG = {**tiny.CONFIG, "vocab_size": 12, "hidden_size": 8}
LAYER = "model.layers.0.mlp.up_proj"
UP = f"{LAYER}.weight"
SHAPE = 256, 96


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm}}


def quark(dtype: str, **more: object) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": "per_channel", "is_dynamic": False}
    stated = {"quant_method": "quark", "global_quant_config": {"weight": weight}, **more}
    return {"quantization_config": stated}


def fp8(scale: Tensor, wide: Tensor, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """A weight in float8 with scales and a scale of activations, and its values."""
    codes = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(
        torch.float8_e4m3fn
    )
    parts = {UP: codes, f"{UP}_scale": scale, f"{LAYER}.input_scale": torch.tensor(0.25)}
    return parts, codes.float() * wide


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) + 0.5


BLOCKS = draw(2, 1)
READ = {
    "modelopt, a scale a tensor": (modelopt("FP8"), draw(1)[0], draw(1)),
    "modelopt, a scale a row": (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), draw(256), draw(256, 1)),
    "modelopt, blocks": (
        modelopt("fp8_pb_wo"),
        BLOCKS.reshape(2, 1, 1, 1),
        BLOCKS.repeat_interleave(128, 0),
    ),
    "modelopt, groups of 32": (
        modelopt("MXFP8"),
        torch.full((256, 3), 126, dtype=torch.uint8),
        torch.tensor(0.5),
    ),
    "modelopt, mixed": (modelopt("MIXED_PRECISION"), draw(1)[0], draw(1)),
    "quark, a scale a row": (quark("fp8_e4m3"), draw(256), draw(256, 1)),
    "quark, layers of their own": (
        quark("fp4", layer_quant_config={"*mlp*": {"weight": {"dtype": "fp8_e4m3"}}}),
        draw(256),
        draw(256, 1),
    ),
}


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    weights = {**tensors, "model.norm.weight": torch.ones(8)}
    return tiny.save_model(folder, weights, config={**CONFIG, **config})


@pytest.mark.parametrize(("config", "scale", "wide"), READ.values(), ids=READ)
def test_fp8_is_read(tmp_path: Path, config: dict[str, Any], scale: Tensor, wide: Tensor) -> None:
    parts, values = fp8(scale, wide)
    tensors = open_checkpoint(save(tmp_path / "model", parts, config), "base").tensors
    assert tensors.keys() == {UP, "model.norm.weight"}
    buffer = bytearray(4 * values.numel())
    tensors[UP].read(one_at_a_time(), 0, memoryview(buffer))
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), values.reshape(-1))


NVFP4 = {
    UP: torch.zeros(256, 48, dtype=torch.uint8),
    f"{UP}_scale": torch.ones(256, 6).to(torch.float8_e4m3fn),
    f"{UP}_scale_2": torch.tensor(0.5),
}
MXFP4 = {
    UP: torch.zeros(256, 48, dtype=torch.uint8),
    f"{UP}_scale": torch.ones(256, 3, dtype=torch.uint8),
}


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (NVFP4, modelopt("NVFP4"), "modelopt NVFP4, according to its config.json"),
        (NVFP4, modelopt("MIXED_PRECISION"), "modelopt MIXED_PRECISION, according to"),
        (NVFP4, {}, "modelopt NVFP4, according to its hf_quant_config.json"),
        (MXFP4, quark("fp4"), "quark, according to its config.json"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], told: str
) -> None:
    folder = save(tmp_path / "model", tensors, config)
    if not config:
        stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    with pytest.raises(QuantizedError) as caught:
        open_checkpoint(folder, "base")
    assert f"is quantised ({told}" in str(caught.value)
    assert "use the checkpoint in its full precision" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [(modelopt("NVFP4"), "modelopt NVFP4"), (quark("int4"), "quark int4"), ({}, "modelopt W4A16")],
)
def test_a_config_that_says_another_format(
    tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    folder = save(tmp_path / "model", fp8(draw(1)[0], draw(1))[0], config)
    if not config:
        stated = {"quantization": {"quant_algo": "w4a16"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, "base")
    assert f"{UP} is stored as fp8 (E4M3) with scales, but its config says {told}" in str(
        caught.value
    )


def test_a_graft_keeps_their_config_only_in_their_format(tmp_path: Path) -> None:
    folders, decoded = [], []
    for seed in range(3):
        parts, values = fp8(draw(1)[0] * (seed + 1), draw(1) * (seed + 1), seed)
        folder = save(tmp_path / str(seed), parts, modelopt("FP8"))
        stated = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(stated))
        folders.append(folder)
        decoded.append(values.double())
    run = ("transfer", *folders, "--allow-unrelated", "-o")
    assert tiny.run(*run, tmp_path / "plain").status == 0
    assert tiny.run(*run, tmp_path / "same", "--requantize").status == 0
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    kept = (tmp_path / "same" / "hf_quant_config.json").read_text()
    assert json.loads(kept)["quantization"]["quant_algo"] == "FP8"
    graft = decoded[2] + (decoded[0] - decoded[1])
    stored = load_file(tmp_path / "same" / "model.safetensors")
    # As Model Optimizer does: the largest is 448 times the scale.
    scale = graft.float().abs().max() / 448
    assert torch.equal(stored[f"{UP}_scale"], scale)
    codes = (graft.float() / scale).to(torch.float8_e4m3fn)
    assert torch.equal(stored[UP].view(torch.uint8), codes.view(torch.uint8))
    assert stored[f"{LAYER}.input_scale"] == 0.25
