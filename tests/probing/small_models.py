"""Small random models of many architectures, and rows of tokens for them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffxfer.family import family_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
NO_IDS = {"bos_token_id": None, "eos_token_id": None}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 4, "num_layers": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "CausalLM", GROUPED),
    "qwen3": ("Qwen3", "CausalLM", GROUPED),
    "mistral": ("Mistral", "CausalLM", GROUPED | {"sliding_window": 4}),
    "gpt2": ("GPT2", "CausalLM", GPT2 | NO_IDS),
    "bloom": (
        "Bloom",
        "CausalLM",
        {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    ),
    "mpt": ("Mpt", "CausalLM", {"d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": 50}),
    "bert": ("Bert", "MaskedLM", SIZES),
    "roberta": ("Roberta", "MaskedLM", SIZES | {"pad_token_id": 1}),
    "albert": ("Albert", "MaskedLM", SIZES | {"embedding_size": 16}),
    "bert classifier": ("Bert", "SequenceClassification", SIZES | {"num_labels": 3}),
    "llama classifier": ("Llama", "SequenceClassification", GROUPED | {"num_labels": 3}),
    "longformer": ("Longformer", "MaskedLM", SIZES | {"attention_window": 4}),
    "qwen3 next": ("Qwen3Next", "CausalLM", GROUPED | LINEAR),
    "mamba": ("Mamba", "CausalLM", MAMBA),
    "t5": ("T5", "Seq2SeqLM", T5 | {"vocab_size": VOCABULARY}),
}

ROWS: list[list[int]] = [
    torch.randint(
        2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()
    for length in (12, 7, 20, 2, 20, 12)
]


def make(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose attention is far from uniform."""
    name, head, settings = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of an architecture."""
    return make(kind, 0), make(kind, 1)


@functools.cache
def member(name: str) -> PreTrainedModel:
    """A model of the shipped family, in float32."""
    return AutoModelForCausalLM.from_pretrained(family_folder() / name, dtype=torch.float32)


@functools.cache
def text_rows() -> list[list[int]]:
    """The text of the shipped family, cut into rows of 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(family_folder() / "base", model_max_length=10**9)
    ids = tokenizer((family_folder() / "text.txt").read_text("utf-8"))["input_ids"]
    return [ids[begin : begin + 128] for begin in range(0, len(ids), 128)]
