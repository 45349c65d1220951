"""A fine-tune that is a part of its base, and a base that is a part of its fine-tune."""

import re
import shutil

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from diffxfer import apply_diff, extract_diff, transfer, verify
from diffxfer.errors import MatchError
from tests import families
from tests.diffs.layouts import models
from tests.families import llama

THINKER = "thinker."


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """Base and target with a thinker and a talker, finetuned the thinker's text model alone."""
    root = tmp_path_factory.mktemp("omni")
    roles = models.save_roles(root, *[(LlamaForCausalLM, llama())] * 3)
    for seed, folder in enumerate(roles[1:]):
        talker = models.save(root / f"talker-{seed}", LlamaForCausalLM, llama(hidden_size=8), seed)
        beside = {f"talker.{name}": tensor for name, tensor in models.load(talker).items()}
        beside["token2wav.scale"] = torch.rand(3)
        models.edit(
            folder,
            lambda tensors, beside=beside: {
                **{THINKER + name: tensor for name, tensor in tensors.items()},
                **beside,
            },
        )
    return roles


def expected_of(omni):
    finetuned, base, target = map(models.load, omni)
    return {
        name: models.graft_of(finetuned[name.removeprefix(THINKER)], base[name], tensor)
        if name.startswith(THINKER)
        else tensor
        for name, tensor in target.items()
    }


class TestOnePrefix:
    def test_a_part_of_its_base(self, omni, tmp_path):
        report = transfer(*omni, tmp_path / "out")
        models.assert_equal(models.load(tmp_path / "out"), expected_of(omni))
        beside = sum(name.startswith(("talker.", "token2wav.")) for name in models.load(omni[2]))
        assert report.tensors["copied"] == beside
        (note,) = [note for note in report.notes if note.startswith("copied from the target")]
        assert f"{beside} tensors (" in note
        assert not report.warnings

    def test_through_a_diff_vector(self, omni, tmp_path):
        report = extract_diff(*omni[:2], tmp_path / "diff", diff_dtype="float64")
        beside = sum(name.startswith(("talker.", "token2wav.")) for name in models.load(omni[1]))
        said = f"only in base, so they have no difference: {beside} tensors ("
        assert any(note.startswith(said) for note in report.notes)
        apply_diff(tmp_path / "diff", omni[2], tmp_path / "out")
        models.assert_equal(models.load(tmp_path / "out"), expected_of(omni))
        assert verify(tmp_path / "diff", base=omni[1], finetuned=omni[0]).restored

    def test_two_parts_that_fit_are_named(self, omni, tmp_path):
        """Its layers fit the thinker and the talker alike; --rename says which is meant."""
        roles = [shutil.copytree(folder, tmp_path / folder.name) for folder in omni]
        for folder in roles[1:]:
            models.edit(
                folder,
                lambda tensors: {
                    **{n: t for n, t in tensors.items() if n.startswith(THINKER)},
                    **{
                        n.replace(THINKER, "talker."): t + 1
                        for n, t in tensors.items()
                        if n.startswith(THINKER)
                    },
                },
            )
        with pytest.raises(MatchError) as caught:
            transfer(*roles, tmp_path / "out")
        assert caught.value.problem == (
            "the layers of finetuned fit 2 parts of target: talker and thinker"
        )
        (option,) = re.findall(r"--rename '([^']*)'", caught.value.remedy)
        option = option.replace("talker", "thinker")
        transfer(*roles, tmp_path / "out", rename=[option])
        finetuned, base, target = map(models.load, roles)
        name = f"{THINKER}model.layers.1.mlp.up_proj.weight"
        grafted = models.graft_of(finetuned[name.removeprefix(THINKER)], base[name], target[name])
        assert torch.equal(models.load(tmp_path / "out")[name], grafted)

    def test_a_missing_layer_is_no_part(self, omni, tmp_path):
        roles = [shutil.copytree(folder, tmp_path / folder.name) for folder in omni]
        models.edit(
            roles[0], lambda tensors: {n: t for n, t in tensors.items() if "layers.1" not in n}
        )
        with pytest.raises(MatchError, match=r"thinker\.model\.layers\.1.* is in base and target"):
            transfer(*roles, tmp_path / "out")

    @pytest.mark.parametrize("gone", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
    def test_a_missing_tensor_is_no_part(self, omni, tmp_path, gone):
        roles = [shutil.copytree(folder, tmp_path / folder.name) for folder in omni]
        models.edit(roles[0], lambda tensors: {n: t for n, t in tensors.items() if n != gone})
        with pytest.raises(MatchError, match=re.escape(gone)):
            transfer(*roles, tmp_path / "out")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    root = tmp_path_factory.mktemp("gemma")
    config = families.gemma3()
    whole, text = Gemma3ForConditionalGeneration, Gemma3ForCausalLM
    for seed, role in enumerate(models.ROLES):
        models.save(root / role / "whole", whole, config, seed)
        models.save(root / role / "text", text, config.text_config, seed)
    return root


class TestTextTowers:
    def test_saved_out_of_a_multimodal_model(self, towers, tmp_path):
        roles = [towers / "finetuned" / "text", towers / "base" / "whole"]
        roles.append(towers / "target" / "whole")
        transfer(*roles, tmp_path / "out")
        finetuned, base, target = map(models.load, roles)
        found = models.load(tmp_path / "out")
        for name, tensor in target.items():
            inner = name.removeprefix("language_model.")
            grafted = name.startswith("language_model.")
            expected = models.graft_of(finetuned[inner], base[name], tensor) if grafted else tensor
            assert torch.equal(found[name], expected), name
        models.load_clean(AutoModelForImageTextToText, tmp_path / "out")

    @pytest.mark.parametrize("layout", ["whole", "text"])
    def test_the_reverse(self, towers, tmp_path, layout):
        """Base is a text model, and finetuned was built around it: its images have no Δ."""
        roles = [towers / "finetuned" / "whole", towers / "base" / "text"]
        roles.append(towers / "target" / layout)
        report = transfer(*roles, tmp_path / "out")
        finetuned, base, target = map(models.load, roles)
        found = models.load(tmp_path / "out")
        for name, tensor in target.items():
            inner = name.removeprefix("language_model.")
            expected = tensor
            if inner in base:
                ours = finetuned[f"language_model.{inner}"]
                expected = models.graft_of(ours, base[inner], tensor)
            assert torch.equal(found[name], expected), name
        assert found.keys() == target.keys()
        assert report.tensors["dropped"] == len(finetuned) - len(base)
        assert any("outside the part" in note for note in report.notes)

    def test_a_target_that_alone_has_more_is_refused_as_ever(self, towers, tmp_path):
        roles = [towers / "finetuned" / "text", towers / "base" / "text"]
        with pytest.raises(MatchError, match="--allow-missing"):
            transfer(*roles, towers / "target" / "whole", tmp_path / "out")


def test_an_encoder_saved_out_of_an_encoder_with_a_decoder(tmp_path):
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    config = T5Config(**sizes, num_heads=2, decoder_start_token_id=0)
    whole = T5ForConditionalGeneration
    roles = models.save_roles(tmp_path, (T5EncoderModel, config), (whole, config), (whole, config))
    transfer(*roles, tmp_path / "out")
    finetuned, base, target = map(models.load, roles)
    found = models.load(tmp_path / "out")
    for name, tensor in target.items():
        expected = tensor
        if name in finetuned:
            expected = models.graft_of(finetuned[name], base[name], tensor)
        assert torch.equal(found[name], expected), name
    models.load_clean(whole, tmp_path / "out")


def omni_config():
    text = {**families.SIZES, "vocab_size": 50}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "rope_theta": 1e4,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2}
    vision |= {"out_hidden_size": 16, "fullatt_block_indexes": [0], "window_size": 28}
    audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 20}
    audio |= {"d_model": 16, "num_mel_bins": 8, "output_dim": 16, "n_window": 2}
    audio["max_source_positions"] = 10
    dit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    dit |= {"emb_dim": 8, "enc_dim": 8, "enc_emb_dim": 8, "enc_channels": [8, 8], "ff_mult": 1}
    dit |= {"enc_kernel_sizes": [3, 1], "enc_dilations": [1, 1], "enc_attention_channels": 4}
    dit |= {"enc_res2net_scale": 2, "enc_se_channels": 4, "mel_dim": 8, "num_embeds": 10}
    vocoder = {"mel_dim": 8, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3]}
    vocoder |= {"resblock_dilation_sizes": [[1, 1, 1]], "upsample_rates": [2]}
    vocoder["upsample_kernel_sizes"] = [4]
    return Qwen2_5OmniConfig(
        thinker_config={"text_config": text, "vision_config": vision, "audio_config": audio},
        talker_config={**text, "head_dim": 8, "embedding_size": 16},
        token2wav_config={"dit_config": dit, "bigvgan_config": vocoder},
    )


def test_a_thinker_of_qwen_omni(tmp_path):
    """What LLaMA-Factory exports: ``model.layers…``, where the whole has ``thinker.model…``."""
    config = omni_config()
    roles = models.save_roles(
        tmp_path,
        (Qwen2_5OmniThinkerForConditionalGeneration, config.thinker_config),
        (Qwen2_5OmniForConditionalGeneration, config),
        (Qwen2_5OmniForConditionalGeneration, config),
    )
    assert "model.layers.0.mlp.up_proj.weight" in models.load(roles[0])
    transfer(*roles, tmp_path / "out")
    found = models.load(tmp_path / "out")
    models.assert_equal(found, expected_of(roles))
    # Its own `from_pretrained` wants a file of voices, which a random model has not.
    load = PreTrainedModel.from_pretrained.__func__
    model, info = load(
        Qwen2_5OmniForConditionalGeneration, tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(
        model.state_dict()["talker.codec_head.weight"], found["talker.codec_head.weight"]
    )
