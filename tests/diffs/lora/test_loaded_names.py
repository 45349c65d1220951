"""Adapters of models whose tensors transformers loads under other names, or stacked."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from diffxfer import extract_diff, transfer
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.diffs.delta.loaded_names import loaded_names
from tests import tiny
from tests.families import llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
FFN = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
MODELS = {
    "T5": (T5ForConditionalGeneration, lambda: T5Config(**T5)),
    "T5, untied": (T5ForConditionalGeneration, lambda: T5Config(**T5, tie_word_embeddings=False)),
    "BART": (BartForConditionalGeneration, lambda: BartConfig(**BART, **HEADS, **FFN)),
    "Llava": (
        LlavaForConditionalGeneration,
        lambda: LlavaConfig(
            text_config=llama(), vision_config=CLIPVisionConfig(**VISION), image_token_id=39
        ),
    ),
    "Gemma 3": (
        Gemma3ForConditionalGeneration,
        lambda: Gemma3Config(
            text_config={**SIZES, "pad_token_id": 0},
            vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
            mm_tokens_per_image=4,
            image_token_id=39,
        ),
    ),
    "Mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**SIZES, num_local_experts=4)),
    "Qwen3-MoE": (
        Qwen3MoeForCausalLM,
        lambda: Qwen3MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=12, mlp_only_layers=[1]
        ),
    ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Gives base and a fine-tune that changed every tensor; tests must not change them."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("pair")
            model_class, config = MODELS[kind]
            torch.manual_seed(0)
            model = model_class(config())
            model.save_pretrained(folder / "base")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.01)
            model.save_pretrained(folder / "finetuned")
            made[kind] = folder / "finetuned", folder / "base"
        return made[kind]

    return make


def merged(kind, adapter, base):
    """What PEFT makes of base and an adapter, by the names on disk; it must not warn."""
    model = MODELS[kind][0].from_pretrained(base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, adapter)
    # PEFT looks for the patterns of parameters among modules when it warns, not when it loads.
    texts = [str(w.message) for w in said if "_pattern keys did not match" not in str(w.message)]
    assert not [text for text in texts if "adapter" in text or "keys" in text]
    whole = model.merge_and_unload()
    return revert_weight_conversion(whole, whole.state_dict())


def weights(folder):
    return load_file(folder / tiny.SHARD)


def assert_near(found, expected):
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=2e-6), name


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_full_rank_is_the_fine_tune(pairs, tmp_path, kind):
    finetuned, base = pairs(kind)
    report = extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=64)
    assert not report.warnings or all("stored whole" in said for said in report.warnings)
    assert report.kept == pytest.approx(1)
    assert_near(merged(kind, tmp_path / "a", base), weights(finetuned))
    transfer(tmp_path / "a", base, base, tmp_path / "out")
    assert_near(weights(tmp_path / "out"), weights(finetuned))


def edited(folder, out, change):
    """A copy of a checkpoint, with its tensors and config changed."""
    shutil.copytree(folder, out)
    state, config = weights(folder), json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, out / tiny.SHARD, {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


class TestExperts:
    def test_of_less_than_full_rank_are_the_best_of_the_stacked_matrices(self, pairs, tmp_path):
        finetuned, base = pairs("Mixtral")
        extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=3)
        found, ours, theirs = (
            merged("Mixtral", tmp_path / "a", base),
            *map(weights, (finetuned, base)),
        )
        for expert in range(4):
            for leaves in (("w1", "w3"), ("w2",)):
                names = [
                    f"model.layers.1.block_sparse_moe.experts.{expert}.{leaf}.weight"
                    for leaf in leaves
                ]
                error = torch.cat([found[name] - ours[name] for name in names])
                delta = torch.cat([ours[name] - theirs[name] for name in names])
                best = torch.linalg.svdvals(delta.double())[3:].square().sum().sqrt()
                assert float(error.norm()) == pytest.approx(float(best), rel=1e-5)

    def test_get_the_rank_that_the_neediest_needs(self, pairs, tmp_path):
        base = pairs("Mixtral")[1]
        wide, narrow = (f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight" for n in (1, 2))

        def change(state, config):
            del config
            state[wide] += torch.diag(torch.tensor([3.0, 2.0, 1.0]).repeat(8))[:16]
            state[narrow][0] += 1

        finetuned = edited(base, tmp_path / "finetuned", change)
        report = extract_diff(finetuned, base, tmp_path / "a", as_="lora", energy=1.0)
        (entry,) = report.factors.values()
        assert entry.rank == 16
        assert config_of(tmp_path / "a")["target_parameters"] == [
            "model.layers.0.mlp.experts.down_proj"
        ]
        found = load_file(tmp_path / "a" / "adapter_model.safetensors")
        module = "base_model.model.model.layers.0.mlp.experts"
        assert {name: tuple(t.shape) for name, t in found.items()} == {
            f"{module}.lora_A.weight": (4 * 16, 24),
            f"{module}.lora_B.weight": (16, 16 * 4),
        }
        assert found[f"{module}.lora_A.weight"].reshape(4, 16, 24)[2, 1:].abs().sum() == 0
        assert_near(merged("Mixtral", tmp_path / "a", base), weights(finetuned))

    def test_may_be_left_out(self, pairs, tmp_path):
        finetuned, base = pairs("Mixtral")
        out = tmp_path / "a"
        extract_diff(finetuned, base, out, as_="lora", rank=64, exclude=[r"experts\.0\.w1"])
        ours, theirs = weights(finetuned), weights(base)
        expected = {n: (theirs if "experts.0.w1" in n else ours)[n] for n in ours}
        assert_near(merged("Mixtral", out, base), expected)

    def test_are_named_by_a_dry_run(self, pairs, tmp_path):
        finetuned, base = pairs("Mixtral")
        planned, done = (
            extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=3, dry_run=dry)
            for dry in (True, False)
        )
        assert planned.bytes_to_write == done.bytes_to_write


def test_a_bare_parameter_that_did_not_change_stores_no_module(pairs, tmp_path):
    base = pairs("Llava")[1]
    name = "multi_modal_projector.linear_1.weight"

    def change(state, config):
        del config
        state[name][0] += 1

    finetuned = edited(base, tmp_path / "finetuned", change)
    extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=4)
    assert config_of(tmp_path / "a")["modules_to_save"] is None
    assert_near(merged("Llava", tmp_path / "a", base), weights(finetuned))


def test_a_model_that_transformers_does_not_know_keeps_its_names_and_is_warned_of(pairs, tmp_path):
    def change(state, config):
        del state
        config["model_type"], config["architectures"] = "unheard", ["UnheardForCausalLM"]

    finetuned, base = (edited(folder, tmp_path / folder.name, change) for folder in pairs("T5"))
    report = extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=4)
    (said,) = [text for text in report.warnings if "transformers" in text]
    assert "does not know this model" in said
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in names


@pytest.mark.parametrize(
    "changed",
    [
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModel"]},
        {"architectures": None},
        {"num_local_experts": "four"},
    ],
)
def test_a_config_that_names_no_model_gives_no_names(pairs, tmp_path, changed):
    base = edited(pairs("Mixtral")[1], tmp_path / "base", lambda _, config: config.update(changed))
    assert loaded_names(open_checkpoint(base, "base")) is None


def test_names_are_found_without_code_of_others(pairs, tmp_path):
    """A kernel would be downloaded and run; a config of a checkpoint must not ask for that."""
    changed = {"_attn_implementation": "org/kernel", "auto_map": {"AutoModel": "org/code--m.M"}}
    base = edited(pairs("Mixtral")[1], tmp_path / "base", lambda _, config: config.update(changed))
    found = loaded_names(open_checkpoint(base, "base"))
    assert found.stacked["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 48, 16)
