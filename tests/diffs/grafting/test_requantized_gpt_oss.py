"""Tiny gpt-oss models in mxfp4, grafted and quantised anew, and loaded by transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.loading import load
from tests import tiny
from tests.checkpoints.encodings.test_requantize import mxfp4

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

STEPS = {"finetuned": 0.005, "base": 0.0, "target": 0.002}
STATED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * 2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save(plain: Path, root: Path, decoded: tuple[str, ...] = ()) -> list[Path]:
    """Three variants of a model, their experts in mxfp4, or in bfloat16 for some roles."""
    weights = load_file(plain / "model.safetensors")
    told = json.loads((plain / "config.json").read_text())
    folders = []
    for seed, (role, step) in enumerate(STEPS.items()):
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            moved = tensor.float() + step * torch.randn(tensor.shape, generator=generator)
            if name.endswith(("gate_up_proj", "down_proj")) and role not in decoded:
                made[f"{name}_blocks"], made[f"{name}_scales"] = mxfp4(moved)
            else:
                made[name] = moved.bfloat16()
        folder = root / role
        folder.mkdir()
        whole = {name: tensor.contiguous() for name, tensor in made.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        more = {} if role in decoded else {"quantization_config": STATED}
        (folder / "config.json").write_text(json.dumps(told | more))
        folders.append(folder)
    return folders


def values(folder: Path) -> dict[str, Tensor]:
    """The values of a checkpoint, as transformers decodes them, in float32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = load_file(folder / "model.safetensors")
    found = {name: tensor for name, tensor in stored.items() if tensor.dtype != torch.uint8}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            scales = stored[f"{weight}_scales"]
            found[weight] = convert_moe_packed_tensors(tensor, scales, dtype=torch.float32)
    return found


@pytest.mark.parametrize("decoded", [(), ("finetuned",)])
def test_the_graft_is_stored_as_the_library_would(
    tmp_path: Path, plain: Path, decoded: tuple[str, ...]
) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    folders = save(plain, tmp_path, decoded)
    out = tmp_path / "out"
    argv = ("transfer", *folders, "-o", out, "--alpha", "0.7", "--requantize", "--json")
    done = tiny.run(*argv)
    assert done.status == 0, done.err
    errors = {each["name"]: each for each in json.loads(done.out)["requantized"]}
    finetuned, base, target = map(values, folders)
    stored, found = load_file(out / "model.safetensors"), values(out)
    assert stored.keys() == load_file(folders[2] / "model.safetensors").keys()
    for name, tensor in target.items():
        graft = tensor.double() + (finetuned[name].double() - base[name].double()) * 0.7
        if f"{name}_blocks" not in stored:
            assert torch.equal(found[name], graft.to(torch.bfloat16)), name
            continue
        blocks, scales = mxfp4(graft.float())
        assert torch.equal(stored[f"{name}_blocks"], blocks), name
        assert torch.equal(stored[f"{name}_scales"], scales), name
        single = graft.float().double()
        error, change = (float((each.double() - single).norm()) for each in (found[name], tensor))
        assert errors[name]["error"] == pytest.approx(error, rel=1e-6)
        assert errors[name]["change"] == pytest.approx(change, rel=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    assert len(errors) == 4
    for name in errors:
        # bfloat16 holds every value of mxfp4.
        assert torch.equal(theirs[name].float(), found[name]), name
    with checkpoint_source(out) as source:
        ours = load(source, dtype=torch.bfloat16).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
