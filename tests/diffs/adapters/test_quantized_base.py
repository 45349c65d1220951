"""An adapter whose base is quantised, as QLoRA trains it: Δ is that of the decoded base."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.checkpoints.encodings.codings import FP8, NF4_DOUBLE
from tests.diffs.adapters.variants import merged

if TYPE_CHECKING:
    from pathlib import Path

    from tests.checkpoints.encodings.codings import Coding


def run(*argv: str | Path) -> None:
    done = tiny.run(*argv)
    assert (done.status, done.err) == (0, "")


def quantise_base(folder: Path, coding: Coding) -> Path:
    """Quantise the matrices of layers, and put the decoded values in base's place."""
    weights = load_file(folder / "base" / tiny.SHARD)
    chosen = {name: tensor for name, tensor in weights.items() if "proj" in name}
    encoded = coding.encode(chosen)
    quantised = folder / "quantised"
    shutil.copytree(folder / "base", quantised)
    save_file({**weights, **encoded}, quantised / tiny.SHARD, metadata={"format": "pt"})
    tiny.edit_json(quantised / "config.json", lambda config: config.update(coding.config))
    plain = {name: tensor.float() for name, tensor in weights.items()} | coding.decode(encoded)
    save_file(plain, folder / "base" / tiny.SHARD, metadata={"format": "pt"})
    return quantised


@pytest.mark.parametrize("coding", [FP8, NF4_DOUBLE], ids=lambda coding: coding.name)
@pytest.mark.parametrize("name", ["alpha over r", "DoRA", "bias all"])
def test_a_graft_is_what_peft_merges(made, tmp_path: Path, name: str, coding: Coding) -> None:
    shutil.copytree(made(name), tmp_path / "family")
    folder, out = tmp_path / "family", tmp_path / "out"
    base = quantise_base(folder, coding)
    options = "--out-dtype", "float64", "--threads", "2"
    run("transfer", folder / "adapter", base, folder / "target", "-o", out, *options)
    found, expected = load_file(out / tiny.SHARD), merged(folder)
    values, target = (load_file(folder / r / tiny.SHARD) for r in ("base", "target"))
    changed = 0
    for tensor, made_here in found.items():
        delta = expected[tensor] - values[tensor].double()
        wanted = target[tensor].double() + delta
        assert torch.allclose(made_here, wanted, rtol=0, atol=1e-15), tensor
        changed += bool(delta.any())
    assert changed


@pytest.mark.parametrize("coding", [FP8, NF4_DOUBLE], ids=lambda coding: coding.name)
def test_a_diff_vector_is_in_bfloat16_unless_the_user_says_otherwise(
    plain: Path, tmp_path: Path, coding: Coding
) -> None:
    base = quantise_base(plain, coding)
    run("extract", plain / "adapter", base, "-o", tmp_path / "diff")
    diff = load_file(tmp_path / "diff" / tiny.SHARD)
    assert {tensor.dtype for tensor in diff.values()} == {torch.bfloat16}
    run("verify", tmp_path / "diff", "--finetuned", plain / "adapter", "--base", base)
    run("apply", tmp_path / "diff", base, "-o", tmp_path / "graft")
    graft = load_file(tmp_path / "graft" / tiny.SHARD)
    values = load_file(plain / "base" / tiny.SHARD)
    for name, tensor in graft.items():
        delta = diff.get(name, torch.zeros(()))
        assert torch.equal(tensor, (values[name].double() + delta.double()).bfloat16()), name
    config = json.loads((tmp_path / "graft" / "config.json").read_text())
    assert "quantization_config" not in config
