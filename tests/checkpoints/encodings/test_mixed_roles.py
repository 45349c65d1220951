"""Roles in different formats, against a computation in float64."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.checkpoints.encodings import scaled_halves
from tests.checkpoints.encodings.codings import FP8, INT4, INT8, NF4_BLOCKS
from tests.helpers import same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.checkpoints.encodings.codings import Coding

CONFIG = {**tiny.CONFIG, "vocab_size": 12, "hidden_size": 8}
ROLES = ("finetuned", "base", "target")
PLAIN = None
MIXTURES = [
    (FP8, FP8, FP8),
    (INT4, FP8, PLAIN),
    (PLAIN, NF4_BLOCKS, INT8),
    (NF4_BLOCKS, PLAIN, INT4),
]


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    base = scaled_halves.example(1)
    near = {"finetuned": scaled_halves.example(2, base), "target": scaled_halves.example(3, base)}
    return {"base": base, **near}


def save(
    root: Path, weights: dict[str, dict[str, Tensor]], mixture: tuple[Coding | None, ...]
) -> tuple[list[Path], dict[str, dict[str, Tensor]]]:
    """Write the three models; returns them, and their values in float32 or bfloat16."""
    folders, values = [], {}
    for role, coding in zip(ROLES, mixture, strict=True):
        stored = {name: tensor.bfloat16() for name, tensor in weights[role].items()}
        config = CONFIG
        if coding is not None:
            stored, config = coding.encode(stored), {**CONFIG, **coding.config}
        values[role] = stored if coding is None else coding.decode(stored)
        folders.append(tiny.save_model(root / role, stored, config=config))
    return folders, values


def run(*argv: str | Path) -> None:
    done = tiny.run(*argv)
    assert done.status == 0, done.err


def compare(folder: Path, expected: dict[str, Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("mixture", MIXTURES)
def test_transfer(tmp_path: Path, weights, mixture: tuple[Coding | None, ...]) -> None:
    folders, values = save(tmp_path, weights, mixture)
    run("transfer", *folders, "-o", tmp_path / "out", "--alpha", "0.7")
    ours, theirs = values["finetuned"], values["base"]
    expected = {
        name: (target.double() + (ours[name].double() - theirs[name].double()) * 0.7).bfloat16()
        for name, target in values["target"].items()
    }
    compare(tmp_path / "out", expected)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_extract_and_apply(tmp_path: Path, weights, mixture: tuple[Coding | None, ...]) -> None:
    (finetuned, base, target), values = save(tmp_path, weights, mixture)
    run("extract", finetuned, base, "-o", tmp_path / "diff")
    delta = {
        name: (ours.double() - values["base"][name].double()).bfloat16()
        for name, ours in values["finetuned"].items()
    }
    found = load_file(tmp_path / "diff" / "model.safetensors")
    for name, tensor in delta.items():
        assert same_bits(found[name], tensor), name
    run("verify", tmp_path / "diff", "--finetuned", finetuned, "--base", base)
    run("apply", tmp_path / "diff", target, "-o", tmp_path / "graft")
    expected = {
        name: (tensor.double() + delta[name].double()).bfloat16()
        for name, tensor in values["target"].items()
    }
    compare(tmp_path / "graft", expected)
    run("apply", tmp_path / "diff", target, "-o", tmp_path / "same", "--alpha", "0")
    compare(tmp_path / "same", {n: tensor.bfloat16() for n, tensor in values["target"].items()})


def test_experts_of_gpt_oss_pair_with_decoded_ones(tmp_path: Path) -> None:
    """Base is in mxfp4; the fine-tuned model holds the decoded experts, as transformers saves."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.down_proj"
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 24, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 128, (2, 24, 3), dtype=torch.uint8, generator=generator)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    plain = {n: tensor.bfloat16() for n, tensor in scaled_halves.example(1).items()}
    stated = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]}}
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    base = tiny.save_model(tmp_path / "base", plain | parts, config={**CONFIG, **stated})
    tuned = values.bfloat16() + torch.randn(values.shape, generator=generator).bfloat16()
    finetuned = tiny.save_model(tmp_path / "finetuned", {**plain, name: tuned}, config=CONFIG)
    run("transfer", finetuned, base, base, "-o", tmp_path / "out")
    expected = values.double() + (tuned.double() - values.double())
    compare(tmp_path / "out", {**plain, name: expected.bfloat16()})
