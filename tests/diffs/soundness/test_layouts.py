"""Layouts of real models, made with transformers' own classes: nothing is found in any of them."""

from dataclasses import dataclass

import pytest
import torch
import transformers as hf

from diffxfer import inspect_checkpoint
from diffxfer.checkpoints.beside import Beside
from diffxfer.diffs.soundness.check import find_contradictions
from diffxfer.diffs.soundness.model import read_model
from tests.families import fast_tokenizer, llama, save_model, save_tokenizer

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2}


def _experts(**more):
    return {**SIZES, **IDS, "vocab_size": 40, "num_experts_per_tok": 1, **more}


LAYOUTS = {
    "llama": (lambda: llama(), hf.AutoModelForCausalLM),
    "tied": (lambda: llama(tie_word_embeddings=True), hf.AutoModelForCausalLM),
    "gqa with a head size of its own": (
        lambda: hf.Qwen3Config(**SIZES, **IDS, vocab_size=40, head_dim=16),
        hf.AutoModelForCausalLM,
    ),
    "gemma": (
        lambda: hf.GemmaConfig(**SIZES, **IDS, vocab_size=40, head_dim=32),
        hf.AutoModelForCausalLM,
    ),
    "gemma 2": (
        lambda: hf.Gemma2Config(**SIZES, **IDS, vocab_size=40, head_dim=32, sliding_window=8),
        hf.AutoModelForCausalLM,
    ),
    "fused qkv of phi 3": (
        lambda: hf.Phi3Config(**SIZES, **IDS, vocab_size=40),
        hf.AutoModelForCausalLM,
    ),
    "gpt 2": (
        lambda: hf.GPT2Config(**GPT, vocab_size=40, bos_token_id=1, eos_token_id=2),
        hf.AutoModelForCausalLM,
    ),
    "bare gpt 2": (
        lambda: hf.GPT2Config(**GPT, vocab_size=40, bos_token_id=1, eos_token_id=2),
        hf.AutoModel,
    ),
    "gpt neox": (
        lambda: hf.GPTNeoXConfig(**ENCODER, **IDS, vocab_size=40),
        hf.AutoModelForCausalLM,
    ),
    "falcon": (
        lambda: hf.FalconConfig(
            **{k: SIZES[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            vocab_size=40,
            bos_token_id=1,
            eos_token_id=2,
        ),
        hf.AutoModelForCausalLM,
    ),
    "opt, whose embedding is narrower": (
        lambda: hf.OPTConfig(
            **{k: SIZES[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            ffn_dim=24,
            word_embed_proj_dim=8,
            do_layer_norm_before=False,
            vocab_size=40,
            max_position_embeddings=32,
            **IDS,
        ),
        hf.AutoModelForCausalLM,
    ),
    "bert": (
        lambda: hf.BertConfig(**ENCODER, vocab_size=40, type_vocab_size=2),
        hf.AutoModelForMaskedLM,
    ),
    "albert, whose layers are one": (
        lambda: hf.AlbertConfig(**ENCODER, vocab_size=40, embedding_size=8, **IDS),
        hf.AutoModelForMaskedLM,
    ),
    "distilbert": (
        lambda: hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=40),
        hf.AutoModelForMaskedLM,
    ),
    "deberta": (
        lambda: hf.DebertaV2Config(**ENCODER, vocab_size=40, embedding_size=8),
        hf.AutoModel,
    ),
    "modernbert": (
        lambda: hf.ModernBertConfig(
            **ENCODER, vocab_size=40, pad_token_id=0, cls_token_id=1, sep_token_id=2, **_ends()
        ),
        hf.AutoModelForMaskedLM,
    ),
    "t5": (
        lambda: hf.T5Config(
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=2,
            vocab_size=40,
            decoder_start_token_id=0,
        ),
        hf.AutoModelForSeq2SeqLM,
    ),
    "bart": (
        lambda: hf.BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=40,
            max_position_embeddings=32,
        ),
        hf.AutoModelForSeq2SeqLM,
    ),
    "whisper": (
        lambda: hf.WhisperConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=40,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **IDS,
        ),
        hf.WhisperForConditionalGeneration,
    ),
    "mamba": (
        lambda: hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4),
        hf.AutoModelForCausalLM,
    ),
    "mixtral": (lambda: hf.MixtralConfig(**_experts(num_local_experts=2)), hf.AutoModelForCausalLM),
    "qwen 3 moe": (
        lambda: hf.Qwen3MoeConfig(
            **_experts(num_experts=2, moe_intermediate_size=8, head_dim=8, norm_topk_prob=True)
        ),
        hf.AutoModelForCausalLM,
    ),
    "deepseek v3, whose attention is latent": (
        lambda: hf.DeepseekV3Config(
            **{**_experts(), "num_key_value_heads": 2, "num_experts_per_tok": 2},
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=8,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        hf.AutoModelForCausalLM,
    ),
    "qwen 3 next, whose layers are of two kinds": (
        lambda: hf.Qwen3NextConfig(
            **_experts(num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8),
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
            layer_types=["linear_attention", "full_attention"],
        ),
        hf.AutoModelForCausalLM,
    ),
    "olmo, whose norms have no weights": (
        lambda: hf.OlmoConfig(**SIZES, **IDS, vocab_size=40),
        hf.AutoModelForCausalLM,
    ),
    "vit, which has no tokens": (
        lambda: hf.ViTConfig(**ENCODER, image_size=8, patch_size=4),
        hf.AutoModel,
    ),
    "wav2vec 2, whose head has the vocabulary": (
        lambda: hf.Wav2Vec2Config(
            **ENCODER,
            vocab_size=12,
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(2, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        hf.Wav2Vec2ForCTC,
    ),
    "clip": (
        lambda: hf.CLIPConfig(
            text_config={**ENCODER, "vocab_size": 40, "max_position_embeddings": 8},
            vision_config={**ENCODER, "hidden_size": 24, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        ),
        hf.AutoModel,
    ),
    "gemma 3, which sees": (
        lambda: hf.Gemma3Config(
            text_config={**SIZES, "vocab_size": 44, "head_dim": 8, **IDS},
            vision_config={**ENCODER, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            boi_token_index=40,
            eoi_token_index=41,
            image_token_index=42,
        ),
        hf.Gemma3ForConditionalGeneration,
    ),
    "llava": (
        lambda: hf.LlavaConfig(
            text_config=llama(vocab_size=44),
            vision_config=hf.CLIPVisionConfig(
                **{**ENCODER, "num_hidden_layers": 4}, image_size=8, patch_size=4
            ),
            image_token_index=43,
        ),
        hf.LlavaForConditionalGeneration,
    ),
    "mllama, whose embedding has eight rows more": (
        lambda: hf.MllamaConfig(
            text_config={
                **SIZES,
                **IDS,
                "vocab_size": 40,
                "num_hidden_layers": 2,
                "cross_attention_layers": [1],
            },
            vision_config={
                "hidden_size": 16,
                "attention_heads": 2,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "intermediate_size": 24,
                "vision_output_dim": 32,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            image_token_index=40,
        ),
        hf.MllamaForConditionalGeneration,
    ),
    "gemma 3n, whose layers have an embedding": (
        lambda: hf.Gemma3nTextConfig(
            **{**SIZES, "num_hidden_layers": 2, "intermediate_size": [24, 24]},
            **IDS,
            head_dim=8,
            vocab_size=44,
            vocab_size_per_layer_input=40,
            hidden_size_per_layer_input=4,
            num_kv_shared_layers=0,
            laurel_rank=4,
            altup_num_inputs=2,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
        ),
        hf.AutoModelForCausalLM,
    ),
}


def _ends():
    return {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_found(layout, tmp_path):
    make, model_class = LAYOUTS[layout]
    save_model(tmp_path / "model", make(), 0, model_class=model_class)
    found = inspect_checkpoint(tmp_path / "model")
    assert found.tensors > 3
    assert found.findings == ()


@dataclass
class Spec:
    """A tensor by its shape."""

    shape: tuple[int, ...]
    dtype: str = "BF16"


BY_SHAPE = {
    # As on the Hub: sizes that no test could hold in memory.
    "qwen 2.5, padded": (
        {"vocab_size": 152064, "hidden_size": 64},
        {"model.embed_tokens.weight": (152064, 64), "lm_head.weight": (152064, 64)},
    ),
    "paligemma, whose outer size is stale": (
        {"vocab_size": 257152, "text_config": {"vocab_size": 257216, "hidden_size": 8}},
        {"language_model.model.embed_tokens.weight": (257216, 8)},
    ),
    "llama with a pad id of -1": (
        {"vocab_size": 32000, "pad_token_id": -1, "hidden_size": 8},
        {"model.embed_tokens.weight": (32000, 8)},
    ),
    "deepseek v3 with its layer for the token after next": (
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 1},
        {f"model.layers.{i}.mlp.up_proj.weight": (8, 8) for i in range(3)},
    ),
    "openelm, whose layers have numbers of heads of their own": (
        {"num_transformer_layers": 2, "num_query_heads": [4, 8], "num_kv_heads": [1, 2]},
        {f"transformer.layers.{i}.attn.qkv_proj.weight": (8 * i + 8, 8) for i in range(2)},
    ),
    "decilm, whose layers have no attention here and there": (
        {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": None},
        {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.2.mlp.up.weight": (8, 8)},
    ),
    "idefics, whose image tokens have rows elsewhere": (
        {"vocab_size": 32000, "additional_vocab_size": 2},
        {
            "model.embed_tokens.weight": (32000, 8),
            "model.embed_tokens.additional_embedding.weight": (2, 8),
        },
    ),
    "mamba of its authors, padded to a multiple": (
        {"vocab_size": 50277, "pad_vocab_size_multiple": 8, "d_model": 8},
        {"backbone.wte.weight": (50280, 8)},
    ),
    "swin, whose layers are stages": (
        {"num_layers": 4, "hidden_size": 64},
        {f"encoder.layers.{i}.blocks.{j}.mlp.weight": (8, 8) for i in range(4) for j in range(6)},
    ),
    "hiera, likewise": (
        {"num_layers": 4},
        {f"encoder.stages.{i}.layers.{j}.mlp.weight": (8, 8) for i in range(4) for j in (0, 1)},
    ),
    "medusa's heads": (
        {"num_hidden_layers": 1},
        {
            "model.layers.0.mlp.up_proj.weight": (8, 8),
            **{f"medusa_head.{i}.0.linear.weight": (8, 8) for i in range(4)},
        },
    ),
    "omni, whose talker has a vocabulary of sounds": (
        {"thinker_config": {"text_config": {"vocab_size": 1000}}, "talker_config": {}},
        {
            "thinker.model.embed_tokens.weight": (1000, 8),
            "talker.model.embed_tokens.weight": (80, 8),
        },
    ),
    "a layer's heads differ from another's": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 8},
        {
            "model.layers.0.self_attn.q_proj.weight": (8, 8),
            "model.layers.1.self_attn.q_proj.weight": (12, 8),
        },
    ),
}


@pytest.mark.parametrize("layout", BY_SHAPE)
def test_nothing_is_found_by_shape(layout, tmp_path):
    config, shapes = BY_SHAPE[layout]
    files = Beside(tmp_path, {"config.json": _json(config)})
    model = read_model(files, {name: Spec(shape) for name, shape in shapes.items()})
    assert find_contradictions(model) == []


def _json(value):
    import json

    return json.dumps(value).encode()


CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "eos", "stops"),
    [
        (None, "<|endoftext|>", 30),
        (CHATML, "<|im_end|>", 32),
        (CHATML, "<|im_end|>", [32, 30]),
        (CHATML, "<|endoftext|>", [30, 32]),  # Qwen's
        ("{{ messages[0].content + eos_token }}", "<|endoftext|>", 30),
        ("{{ bos_token }}{{ messages[0].content }}", "<|endoftext|>", 30),
    ],
)
def test_stops_that_hold(template, eos, stops, tmp_path):
    save_model(tmp_path, llama(eos_token_id=stops), 0)
    save_tokenizer(
        tmp_path,
        fast_tokenizer(TOKENS),
        template=template,
        generation={"eos_token_id": stops},
        eos_token=eos,
    )
    assert inspect_checkpoint(tmp_path).findings == ()


@pytest.mark.parametrize("rows", [33, 40])
def test_padding_rows(rows, tmp_path):
    save_model(tmp_path, llama(vocab_size=rows), 0)
    save_tokenizer(tmp_path, fast_tokenizer(TOKENS))
    assert inspect_checkpoint(tmp_path).findings == ()


def test_a_model_that_does_not_see_keeps_its_family_s_placeholders(tmp_path):
    """Gemma 3 1B has 262,144 rows, and `<image_soft_token>` with that id."""
    save_model(tmp_path, llama(vocab_size=33), 0)
    save_tokenizer(tmp_path, fast_tokenizer((*TOKENS, "<image_soft_token>")))
    assert inspect_checkpoint(tmp_path).findings == ()


def test_quantised_weights_have_shapes_of_their_own(tmp_path):
    from safetensors.torch import save_file

    tensors = {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(2, 4, dtype=torch.int32)}
    tensors["model.embed_tokens.weight"] = torch.zeros(50, 2)
    config = {"hidden_size": 16, "num_hidden_layers": 4, "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_bytes(_json(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert inspect_checkpoint(tmp_path).findings == ()
