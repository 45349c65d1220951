"""Tiny models that the formats' own libraries quantised, grafted and loaded by transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.loading import load
from tests import tiny
from tests.checkpoints.encodings.test_references import CASES, compress
from tests.helpers import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

STEPS = {"finetuned": 0.002, "base": 0.0, "target": 0.001}
LOADED = [CASES[1], CASES[5], CASES[9], CASES[10]]
"""float8 by row, int4 in groups, NVFP4 and mxfp4."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=2,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantise(
    plain: Path,
    root: Path,
    parts_of: Callable[[str, Tensor], dict[str, Tensor]],
    config: Callable[[], dict[str, Any]],
) -> list[Path]:
    """Three variants of a model, their projections quantised."""
    weights = load_file(plain / "model.safetensors")
    told = json.loads((plain / "config.json").read_text())
    folders = []
    for seed, (role, step) in enumerate(STEPS.items()):
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            noise = torch.randn(tensor.shape, generator=generator)
            moved = tensor.float() + step * noise
            quantised = name.endswith("proj.weight")
            made |= parts_of(name, moved) if quantised else {name: moved.bfloat16()}
        folder = root / role
        folder.mkdir()
        whole = {name: tensor.contiguous() for name, tensor in made.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(told | config()))
        folders.append(folder)
    return folders


def run(*argv: str | Path) -> None:
    done = tiny.run(*argv)
    assert done.status == 0, done.err


def values(folder: Path) -> dict[str, Tensor]:
    """The decoded values of a checkpoint in float32, by an independent formula."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            wide = scale.repeat_interleave(64, 0).repeat_interleave(32, 1)
            tensor = tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
        if not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def test_fp8_experts(tmp_path: Path, plain: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    said: dict[str, Any] = {"weight_block_size": [64, 32], "scale_fmt": "float"}
    library: Any = Fp8Quantize(SimpleNamespace(quantization_config=SimpleNamespace(**said)))
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", **said}
    folders = quantise(
        plain,
        tmp_path,
        lambda name, tensor: library.convert({name: tensor}),
        lambda: {"quantization_config": stated},
    )
    run("transfer", *folders, "-o", tmp_path / "plain", "--alpha", "0.7")
    run("transfer", *folders, "-o", tmp_path / "out", "--alpha", "0.7", "--requantize")
    run("extract", *folders[:2], "-o", tmp_path / "diff", "--diff-dtype", "float64")
    run("apply", tmp_path / "diff", folders[2], "-o", tmp_path / "two", "--alpha", "0.7")
    finetuned, base, target = map(values, folders)
    decoded = load_file(tmp_path / "plain" / "model.safetensors")
    two = load_file(tmp_path / "two" / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in target.items():
        graft = tensor.double() + (finetuned[name].double() - base[name].double()) * 0.7
        assert same_bits(decoded[name], graft.to(torch.bfloat16)), name
        assert same_bits(two[name], graft.to(torch.bfloat16)), name
        if f"{name}_scale_inv" in stored:
            expected = library.convert({name: graft.float()})
            for part, due in expected.items():
                assert torch.equal(stored[part].view(torch.uint8), due.view(torch.uint8)), part
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(64, 32)),
        dtype=torch.bfloat16,
    ).state_dict()
    with checkpoint_source(tmp_path / "out") as source:
        ours = load(source, dtype=torch.bfloat16).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # Without --requantize it is an ordinary checkpoint.
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize(("kind", "stated", "_shape"), LOADED)
def test_compressed_tensors(
    tmp_path: Path, llama: Path, kind: str, stated: dict[str, Any], _shape: tuple[int, int]
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    known: dict[str, Any] = {}

    def parts_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
        parts, config, _ = compress(kind, stated, tensor)
        known.update(config)
        prefix = name.removesuffix("weight")
        return {prefix + part.rpartition("up_proj.")[2]: each for part, each in parts.items()}

    def config() -> dict[str, Any]:
        more = {"ignore": ["lm_head"], "quantization_status": "compressed"}
        return {"quantization_config": {**known["quantization_config"], **more}}

    folders = quantise(llama, tmp_path, parts_of, config)
    run("transfer", *folders, "-o", tmp_path / "out", "--requantize")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with checkpoint_source(tmp_path / "out") as source:
        ours = load(source, dtype=torch.bfloat16).model
    ids = torch.arange(8)[None]
    with torch.no_grad():
        theirs, found = model(ids).logits.float(), ours(ids).logits.float()
    # The library multiplies in 16 bits.
    assert float((theirs - found).abs().max()) < 0.02 * float(theirs.abs().max())
