"""The permuted copy of a model computes the same in other coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from diffxfer.probing.permute import permuted_source
from tests.families import randomize
from tests.probing.sources import Weights, saved, store, stored

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", GROUPED, "self_attn.q_proj"),
    "llama, one key head": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}, "self_attn.q_proj"),
    "qwen2": ("Qwen2Config", GROUPED, "self_attn.k_proj"),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}, "self_attn.v_proj"),
    "qwen3 moe": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "head_dim": 16}, "experts.2.up_proj"),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3}, "experts.1.w2"),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}, "self_attn.o_proj"),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}, "mlp.down_proj"),
    "mistral": ("MistralConfig", GROUPED, "mlp.gate_proj"),
    "olmo2, norms over all heads": ("Olmo2Config", GROUPED, "self_attn.q_norm"),
    "cohere, a norm by head": (
        "CohereConfig",
        {**GROUPED, "use_qk_norm": True},
        "self_attn.k_norm",
    ),
    "phi3, fused": ("Phi3Config", {**GROUPED, "pad_token_id": 0}, "self_attn.qkv_proj"),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64},
        "attn.c_attn",
    ),
    "gpt neox": ("GPTNeoXConfig", SIZES, "attention.query_key_value"),
    "bert": ("BertConfig", SIZES, "attention.self.query"),
    "roberta": ("RobertaConfig", {**SIZES, "pad_token_id": 1}, "intermediate.dense"),
}


def make(case: str, folder: Path) -> Weights:
    kind, sizes, _ = CASES[case]
    config = getattr(transformers, kind)(**sizes)
    auto = AutoModelForMaskedLM if case in ("bert", "roberta") else AutoModelForCausalLM
    model = auto.from_config(config)
    randomize(model, 0)
    return saved(model, folder)


def logits(folder: Path) -> Tensor:
    masked = "MaskedLM" in (folder / "config.json").read_text()
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_with_other_weights(case: str, tmp_path: Path) -> None:
    source = make(case, tmp_path / "a")
    permuted, what = permuted_source(source, 3)
    assert permuted is not None, what
    assert "the heads of 2 layers and the units of" in what
    name = next(name for name in source.names() if CASES[case][2] in name)
    assert not torch.equal(permuted.tensor(name), source.tensor(name))
    ours, theirs = logits(source.folder), logits(store(permuted, tmp_path / "b"))
    scale = ours.abs().max().item()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, scale))
    # The control must differ in far more than a few heads: as a path it is from another place.
    changed = [n for n in source.names() if not torch.equal(permuted.tensor(n), source.tensor(n))]
    assert len(changed) >= (8 if "fused" in case else 10)


def test_layers_have_permutations_of_their_own_and_seeds_differ(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "a")
    up = "model.layers.{}.mlp.up_proj.weight"
    source._tensors = {**source._tensors, up.format(1): source.tensor(up.format(0))}
    one, again, other = (permuted_source(source, seed).source for seed in (0, 0, 1))
    assert one is not None
    assert again is not None
    assert other is not None
    first, second = (one.tensor(up.format(layer)) for layer in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(again.tensor(up.format(0)), first)
    assert not torch.equal(other.tensor(up.format(0)), first)
    # Whole rows move: the same rows in another order.
    rows = {tuple(row.tolist()) for row in first}
    assert rows == {tuple(row.tolist()) for row in source.tensor(up.format(0))}


@pytest.mark.parametrize(
    ("added", "what"),
    [
        ("model.layers.1.self_attn.head_scale", "the heads of 1 layers and the units of 2 MLPs"),
        ("model.layers.1.mlp.unit_norm.weight", "the heads of 2 layers and the units of 1 MLPs"),
        (
            "model.layers.0.mlp.up_proj.weight_scale",
            "the heads of 2 layers and the units of 1 MLPs",
        ),
    ],
)
def test_a_layer_with_an_unknown_tensor_stays(added: str, what: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "a")
    source._tensors = {**source._tensors, added: torch.ones(4)}
    assert permuted_source(source).what == f"{what} were permuted"


def test_other_numbers_of_heads_than_the_config_states_stay(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "a")
    path = source.folder / "config.json"
    path.write_text(path.read_text().replace('"head_dim": 4', '"head_dim": 16'))
    assert permuted_source(stored(source.folder)).what == "the units of 2 MLPs were permuted"


def test_a_model_without_known_tensors_is_left_out(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)
    source = saved(AutoModel.from_config(config), tmp_path / "a")
    found = permuted_source(source)
    assert found.source is None
    assert "no attention heads or MLP units were recognised" in found.what
