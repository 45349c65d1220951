"""Small models, and LoRA adapters of every kind, made by PEFT."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

LLAMA: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
EXPERTS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WHISPER = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_mel_bins": 8,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FUSED = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


def llama(**changed: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changed}))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**GPT2))


def gpt_oss(**changed: Any) -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**{**EXPERTS, **changed}))


def llama4(intermediate: int) -> nn.Module:
    sizes = {**EXPERTS, "intermediate_size": intermediate, "intermediate_size_mlp": 24}
    return Llama4ForCausalLM(
        Llama4TextConfig(**sizes, interleave_moe_layer_step=1, num_experts_per_tok=1)
    )


def mixtral(intermediate: int = 24) -> nn.Module:
    sizes = {**EXPERTS, "intermediate_size": intermediate}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_experts_per_tok=1))


def qwen3_moe() -> nn.Module:
    sizes = {**EXPERTS, "num_hidden_layers": 2, "moe_intermediate_size": 12, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=1, mlp_only_layers=[1])
    return Qwen3MoeForCausalLM(config)


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(WhisperConfig(**WHISPER))


@dataclass(frozen=True)
class Variant:
    """An adapter.

    Attributes:
        make: makes the model.
        options: what differs from a plain LoraConfig.
        needs_base: whether its Δ depends on base.
        dtype: the dtype of the factors on disk.
    """

    make: Any = llama
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_base: bool = False
    dtype: torch.dtype = torch.float32


def lora(make: Any = llama, *, needs_base: bool = False, **options: Any) -> Variant:
    return Variant(make, options, needs_base)


def dora(make: Any = llama, **options: Any) -> Variant:
    return lora(make, needs_base=True, use_dora=True, **options)


VARIANTS: Mapping[str, Variant] = {
    "alpha over r": lora(),
    "bfloat16 factors": Variant(dtype=torch.bfloat16),
    "float16 factors": Variant(dtype=torch.float16),
    "rank 1": lora(r=1),
    "rslora": lora(use_rslora=True),
    "patterns": lora(
        rank_pattern={"layers.1.mlp.down_proj": 8, "q_proj": 2}, alpha_pattern={r".*\.0\..*": 3}
    ),
    "rslora with patterns": lora(use_rslora=True, rank_pattern={"^model.layers.1.*q_proj": 3}),
    "all linear": lora(target_modules="all-linear"),
    "bias all": lora(bias="all", needs_base=True),
    "bias lora_only": lora(bias="lora_only", needs_base=True),
    "lora_bias": lora(lora_bias=True, target_modules=["q_proj"]),
    "embedding and head": lora(target_modules=["embed_tokens", "lm_head"]),
    "modules_to_save": lora(modules_to_save=["lm_head", "norm"], needs_base=True),
    "token rows": lora(trainable_token_indices=[7, 3, 11], needs_base=True),
    "token rows by module": lora(
        trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [1]}, needs_base=True
    ),
    "token rows, tied": lora(
        lambda: llama(tie_word_embeddings=True),
        trainable_token_indices=[7, 3],
        needs_base=True,
    ),
    "tied": lora(lambda: llama(tie_word_embeddings=True)),
    "Conv1D": lora(gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "square Conv1D": lora(gpt2, target_modules=["attn.c_proj"], fan_in_fan_out=True),
    "square Conv1D beside a linear head": lora(gpt2, target_modules=["attn.c_proj", "lm_head"]),
    "square linear, with fan_in_fan_out": lora(fan_in_fan_out=True, target_modules=["q_proj"]),
    "experts as (in, out)": lora(
        gpt_oss, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "square experts alone": lora(gpt_oss, target_parameters=["mlp.experts.down_proj"]),
    "experts with a pattern": lora(
        gpt_oss,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
    ),
    "Llama 4 experts": lora(lambda: llama4(24), target_parameters=FUSED),
    "square Llama 4 experts": lora(lambda: llama4(16), target_parameters=FUSED),
    "Mixtral experts": lora(mixtral, target_parameters=STACKED),
    "square Mixtral experts": lora(lambda: mixtral(16), target_parameters=STACKED),
    "square Mixtral gates": lora(lambda: mixtral(8), target_parameters=STACKED),
    "some Mixtral experts": lora(
        mixtral,
        target_parameters=["layers.0.mlp.experts.down_proj"],
        target_modules=["q_proj"],
    ),
    "Qwen3-MoE experts": lora(
        qwen3_moe,
        target_parameters=[*STACKED, "mlp.gate.weight"],
        rank_pattern={"experts.gate_up_proj": 3},
        use_rslora=True,
    ),
    "router": lora(gpt_oss, target_parameters=["mlp.router.weight"]),
    "DoRA": dora(),
    "DoRA with rslora": dora(use_rslora=True, r=3),
    "DoRA of an embedding": dora(target_modules=["embed_tokens"]),
    "DoRA of Conv1D": dora(gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "convolution": lora(whisper, target_modules=["conv1", "conv2", "q_proj"]),
    "DoRA of a convolution": dora(whisper, target_modules=["conv1"]),
}


def make_adapter(variant: Variant, folder: Path) -> None:
    """Write base, target, and the adapter with factors drawn at random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = variant.make().bfloat16()
    save(base, folder / "base")
    save(near(base), folder / "target")
    plain: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [] if "target_parameters" in variant.options else ["q_proj", "down_proj"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.float(), LoraConfig(**{**plain, **variant.options}))
        randomised(model).to(variant.dtype).save_pretrained(folder / "adapter")


def near(base: nn.Module) -> nn.Module:
    """A model that differs a little."""
    torch.manual_seed(1)
    found = copy.deepcopy(base)
    with torch.no_grad():
        for tensor in found.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.002)
    return found


def randomised(model: Any) -> Any:
    """The model, with what is trained moved at random."""
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def save(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


def merged(
    folder: Path, dtype: torch.dtype = torch.float64, *, autocast: bool = False
) -> dict[str, Tensor]:
    """What PEFT's own merge makes of base and the adapter, by the names on disk.

    Args:
        folder: the folder of both.
        dtype: the dtype in which base is loaded.
        autocast: whether factors of 16 bits become float32, as PEFT does by default; else they
            get base's dtype.
    """
    from peft import PeftModel
    from transformers.core_model_loading import revert_weight_conversion

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load(folder / "base", dtype)
        model = PeftModel.from_pretrained(base, folder / "adapter", autocast_adapter_dtype=autocast)
        found = model if autocast else model.to(dtype)
        whole = found.merge_and_unload()
        return revert_weight_conversion(whole, whole.state_dict())


def load(folder: Path, dtype: torch.dtype) -> Any:
    """A model, by the class that its config names."""
    import json

    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype)
