"""Buffers are not weights: the target's are kept and others are dropped, whatever their values."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from diffxfer import apply_diff, extract_diff, transfer, verify
from diffxfer.checkpoints.stored import ShardFile, TensorSpec
from diffxfer.diffs.matching.buffers import is_buffer
from diffxfer.errors import MatchError
from tests.diffs.layouts import models
from tests.families import llama

GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}


def masks(prefix=""):
    """What old versions of transformers saved with a GPT-2."""
    mask = torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8)
    found = {f"{prefix}h.{i}.attn.bias": mask for i in range(2)}
    return found | {f"{prefix}h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


class TestGPT2:
    def test_of_the_hub_against_a_fine_tune_under_its_prefix(self, tmp_path):
        config = GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None)
        roles = models.save_roles(
            tmp_path, (GPT2LMHeadModel, config), (GPT2Model, config), (GPT2Model, config)
        )
        for folder in roles[1:]:
            models.edit(folder, lambda tensors: tensors | masks())
        report = transfer(*roles, tmp_path / "out")
        finetuned, base, target = map(models.load, roles)
        expected = {
            name: tensor
            if name in masks()
            else models.graft_of(finetuned[f"transformer.{name}"], base[name], tensor)
            for name, tensor in target.items()
        }
        models.assert_equal(models.load(tmp_path / "out"), expected)
        assert report.tensors == {"grafted": len(target) - 4, "copied": 4}
        assert any(note.startswith("buffers copied from the target") for note in report.notes)

    @pytest.mark.parametrize("lacking", models.ROLES)
    def test_masks_in_some_roles_only(self, tmp_path, lacking):
        config = GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None)
        roles = models.save_roles(tmp_path, *[(GPT2LMHeadModel, config)] * 3)
        for role, folder in zip(models.ROLES, roles, strict=True):
            if role != lacking:
                models.edit(folder, lambda tensors: tensors | masks("transformer."))
        transfer(*roles, tmp_path / "out")
        assert models.load(tmp_path / "out").keys() == models.load(roles[2]).keys()
        if lacking == "target":
            models.load_clean(GPT2LMHeadModel, tmp_path / "out")

    def test_a_mask_may_hold_infinity_and_keeps_its_dtype(self, tmp_path):
        config = GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None)
        roles = models.save_roles(tmp_path, *[(GPT2LMHeadModel, config)] * 3)
        mask = {"transformer.h.0.attn.masked_bias": torch.tensor(float("-inf"))}
        models.edit(roles[2], lambda tensors: tensors | mask)
        transfer(*roles, tmp_path / "out", out_dtype="bfloat16")
        (found,) = [models.load(tmp_path / "out")[name] for name in mask]
        assert found == mask["transformer.h.0.attn.masked_bias"]
        assert found.dtype == torch.float32


@pytest.fixture
def resnets(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    roles = models.save_roles(tmp_path, *[(ResNetForImageClassification, config)] * 3)
    for place, folder in enumerate(roles):
        models.edit(
            folder,
            lambda tensors, place=place: {
                name: tensor + place if _counts(name) else tensor
                for name, tensor in tensors.items()
            },
        )
    return roles


def _counts(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


class TestBatchNorm:
    def test_counters_that_moved(self, resnets, tmp_path):
        transfer(*resnets, tmp_path / "out")
        finetuned, base, target = map(models.load, resnets)
        expected = {
            name: tensor if _counts(name) else models.graft_of(finetuned[name], base[name], tensor)
            for name, tensor in target.items()
        }
        models.assert_equal(models.load(tmp_path / "out"), expected)
        models.load_clean(ResNetForImageClassification, tmp_path / "out")

    def test_a_diff_vector_has_none(self, resnets, tmp_path):
        report = extract_diff(*resnets[:2], tmp_path / "diff", diff_dtype="float64")
        assert not any(map(_counts, models.load(tmp_path / "diff")))
        count = sum(map(_counts, models.load(resnets[0])))
        (note,) = report.notes
        assert note.startswith(f"buffers left out, since they are not weights: {count} ")
        apply_diff(tmp_path / "diff", resnets[2], tmp_path / "applied")
        transfer(*resnets, tmp_path / "out")
        models.assert_equal(models.load(tmp_path / "applied"), models.load(tmp_path / "out"))
        assert verify(tmp_path / "diff", base=resnets[1], finetuned=resnets[0]).restored


class TestOthers:
    def test_rotary_frequencies_of_an_old_base(self, tmp_path):
        roles = models.save_roles(tmp_path, *[(LlamaForCausalLM, llama())] * 3)
        old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
        models.edit(roles[1], lambda tensors: tensors | old)
        report = transfer(*roles, tmp_path / "out")
        models.load_clean(LlamaForCausalLM, tmp_path / "out")
        assert report.tensors == {"grafted": len(models.load(roles[2])), "dropped": 2}
        assert not any("--allow-missing" in warning for warning in report.warnings)

    def test_position_ids_of_another_length(self, tmp_path):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(**sizes, intermediate_size=24, vocab_size=50, pad_token_id=None)
        roles = models.save_roles(tmp_path, *[(BertForMaskedLM, config)] * 3)
        name = "bert.embeddings.position_ids"
        for length, folder in zip((512, 514), roles[:2], strict=True):
            ids = torch.arange(length)[None]
            models.edit(folder, lambda tensors, ids=ids: tensors | {name: ids})
        transfer(*roles, tmp_path / "out")
        models.load_clean(BertForMaskedLM, tmp_path / "out")

    def test_integers_that_are_no_buffers_must_agree_as_ever(self, tmp_path):
        roles = models.save_roles(tmp_path, *[(LlamaForCausalLM, llama())] * 3)
        for value, folder in enumerate(roles):
            steps = {"model.steps": torch.tensor([value])}
            models.edit(folder, lambda tensors, steps=steps: tensors | steps)
        with pytest.raises(MatchError, match=r"model\.steps"):
            transfer(*roles, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "found"),
    [
        ("h.0.attn.bias", "F32", (1, 1, 8, 8), True),
        ("h.0.attn.bias", "BOOL", (1, 1, 8, 8), True),
        ("gpt_neox.layers.0.attention.bias", "U8", (1, 1, 8, 8), True),
        ("h.0.attn.bias", "F32", (8,), False),
        ("h.0.attn.bias", "F32", (8, 8), False),
        ("h.0.attn.c_attn.bias", "F32", (1, 1, 8, 8), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,), True),
        ("vision.embeddings.position_ids", "I64", (1, 9), True),
        ("embeddings.position_ids", "F32", (9, 4), False),
        ("n.running_mean", "F32", (4,), True),
        ("n.running_mean.weight", "F32", (4,), False),
        ("model.norm.weight", "F32", (4,), False),
    ],
)
def test_what_is_a_buffer(tmp_path, name, dtype, shape, found):
    shard = ShardFile(tmp_path, 0, (0, 0, 0, 0), "")
    assert is_buffer(name, TensorSpec(name, dtype, shape, 0, shard)) is found
