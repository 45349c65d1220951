"""Tiny models and fine-tunes of them, and what PEFT makes of an adapter."""

import copy
import warnings

import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.families import llama

GPT2 = GPT2Config(
    vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
)
KINDS = {
    "untied": (LlamaForCausalLM, llama(attention_bias=True)),
    "tied": (LlamaForCausalLM, llama(tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "classifier": (LlamaForSequenceClassification, llama(pad_token_id=0)),
}


def save_pair(folder, kind, change=bool, *, rows=None):
    """A base in float32, and a fine-tune that changed all tensors, or those that are selected."""
    model_class, config = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config))  # a model that is resized changes its config
    model.save_pretrained(folder / "base")
    if rows is not None:
        model.resize_token_embeddings(rows)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if change(name):
                parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(folder / "finetuned")
    return folder / "finetuned", folder / "base"


def save_adapter(folder, kind="untied", **options):
    """A target, and an adapter that PEFT made for another base of its kind."""
    import peft

    model_class, config = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config))
    model.save_pretrained(folder / "base")
    target = model_class(config)
    target.save_pretrained(folder / "target")
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with warnings.catch_warnings():  # PEFT remarks on embeddings and biases
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    return folder / "adapter", folder / "target"


def merged_by_peft(adapter, base, kind, *, rows=None, runs=True):
    """The tensors that PEFT makes of base and an adapter, in float64.

    If the model runs in float64, its output before the merge is that after it.
    """
    from peft import PeftModel

    words = torch.arange(12)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = KINDS[kind][0].from_pretrained(base, dtype=torch.float64)
        if rows is not None:
            model.resize_token_embeddings(rows)
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
        before = model(input_ids=words).logits.detach() if runs else None
        merged = model.merge_and_unload()
        if runs:
            after = merged(input_ids=words).logits.detach()
            assert torch.allclose(before, after, atol=1e-12), "merging changes nothing"
    return merged.state_dict()


def tensors(folder):
    return {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
