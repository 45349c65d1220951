"""Tiny families of models: saved by transformers, or tensor by tensor if it has no such model.

Weights are random and not zero. The tensors of the roles differ, and are as close to each other as
in models that were trained from one another.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

logging.disable_progress_bar()

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WORDS = tuple(f"w{i}" for i in range(30))


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "vocab_size": 50, "tie_word_embeddings": False, **changes})


def qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeConfig(**{**SIZES, **experts, "vocab_size": 50, "head_dim": 8, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralConfig(**{**SIZES, **experts, "vocab_size": 50, **changes})


def gemma3(**changes: Any) -> Gemma3Config:
    text = {**SIZES, "vocab_size": 50, "head_dim": 8, **changes}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "num_attention_heads": 2}
    vision |= {"hidden_size": 16, "intermediate_size": 20}
    ids = {"boi_token_index": 46, "eoi_token_index": 47, "image_token_index": 48}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Set every parameter to values that all seeds share plus values of this seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            shared = torch.Generator().manual_seed(place)
            values = torch.randn(parameter.shape, generator=shared) * 0.2
            values += torch.randn(parameter.shape, generator=generator) * 0.05
            values[values == 0] = 0.1
            parameter.copy_(values)


def save_model(
    folder: Path,
    config: PretrainedConfig,
    seed: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "1GB",
    model_class: Any = AutoModelForCausalLM,
) -> Path:
    """A model of that config with random weights, as transformers saves it."""
    if hasattr(model_class, "from_config"):
        model = model_class.from_config(config)
    else:
        model = model_class(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def fast_tokenizer(
    specials: Sequence[str] = (), words: Sequence[str] = WORDS, plain: Sequence[str] = ()
) -> Tokenizer:
    """Words, then special tokens, then added tokens that are not special."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def save_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A tokenizer as transformers saves it, and generation settings if there are any."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.chat_template = template
    fast.save_pretrained(folder)
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(folder)
    return folder


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    cuts: Sequence[int] = (),
) -> Path:
    """A checkpoint tensor by tensor, cut into shards at these positions."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **(config or {})}))
    names = list(tensors)
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(names)}), len(names)]
    parts = [names[a:b] for a, b in pairwise(edges)]
    if len(parts) == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def rename_tensors(folder: Path, renamed: Mapping[str, str]) -> Path:
    """Rename the tensors of a single-shard checkpoint by prefix."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        old = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        tensors[renamed.get(old, "") + name[len(old) :]] = tensor
    save_file(tensors, path, {"format": "pt"})
    return folder


def edit_tensors(folder: Path, **changed: Tensor) -> Path:
    """Add or replace tensors of a single-shard checkpoint; ``__`` stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): t for name, t in changed.items()}
    save_file(tensors, path, {"format": "pt"})
    return folder


def fingerprints(*folders: Path) -> dict[Path, tuple[str, int]]:
    """The digest and the time of every file."""
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load_whole(folder: Path, model_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Load a model with transformers; no tensor may be missing, unexpected or mismatched."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[None, -24:]).logits
    assert bool(torch.isfinite(logits).all())
    return model


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)
