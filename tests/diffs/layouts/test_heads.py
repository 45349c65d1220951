"""Heads of other shapes: in numbered layers, with buffers, beside the head for words."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from diffxfer import transfer
from diffxfer.errors import MatchError
from tests import families
from tests.diffs.layouts import models
from tests.diffs.layouts.test_added import UNTIED
from tests.families import llama


def resnets(root):
    """The classifier of a ResNet is the second of a numbered list: ``classifier.1.weight``."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    bare = ResNetModel, ResNetConfig(**sizes)
    tuned = ResNetForImageClassification, ResNetConfig(**sizes, num_labels=3)
    return models.save_roles(root, tuned, bare, bare)


class TestNumberedHeads:
    def test_refused_by_default(self, tmp_path):
        with pytest.raises(MatchError, match=r"classifier\.1\..* in finetuned only.*--added bring"):
            transfer(*resnets(tmp_path), tmp_path / "out")

    def test_brought(self, tmp_path):
        roles = resnets(tmp_path)
        transfer(*roles, tmp_path / "out", added="bring")
        finetuned, base, target = map(models.load, roles)
        found = models.load(tmp_path / "out")
        inner = "encoder.stages.0.layers.0.layer.0.convolution.weight"
        grafted = models.graft_of(finetuned[f"resnet.{inner}"], base[inner], target[inner])
        assert torch.equal(found[inner], grafted)
        for name in ("classifier.1.weight", "classifier.1.bias"):
            assert torch.equal(found[name], finetuned[name])
        models.load_clean(ResNetForImageClassification, tmp_path / "out")

    def test_the_reverse_is_no_part(self, tmp_path):
        classifier, bare, _ = resnets(tmp_path)
        with pytest.raises(MatchError, match=r"classifier\.1\..* is in base and target only"):
            transfer(bare, classifier, classifier, tmp_path / "out")

    def test_layers_of_a_value_head(self, tmp_path):
        roles = models.save_roles(tmp_path, *[(LlamaForCausalLM, llama(**UNTIED))] * 3)
        head = {"v_head.0.weight": torch.rand(16, 16), "v_head.2.weight": torch.rand(1, 16)}
        models.edit(roles[0], lambda tensors: tensors | head)
        with pytest.raises(MatchError, match=r"v_head.* in finetuned only.*--added bring"):
            transfer(*roles, tmp_path / "out")
        transfer(*roles, tmp_path / "out", added="bring")
        found = models.load(tmp_path / "out")
        assert all(torch.equal(found[name], tensor) for name, tensor in head.items())


class TestAPartAndItsHead:
    def test_a_text_tower_that_lost_its_head_is_refused(self, tmp_path):
        config = families.gemma3(tie_word_embeddings=False)
        config.tie_word_embeddings = False
        whole = Gemma3ForConditionalGeneration, config
        text = Gemma3ForCausalLM, config.text_config
        roles = models.save_roles(tmp_path, text, whole, whole)
        models.edit(roles[0], lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
        with pytest.raises(MatchError, match=r"1 tensor does not fit: language_model\.lm_head"):
            transfer(*roles, tmp_path / "out")

    def test_the_head_of_a_decoder_is_not_an_encoder_s(self, tmp_path):
        sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
        config = T5Config(**sizes, num_heads=2, decoder_start_token_id=0)
        whole = T5ForConditionalGeneration, config
        roles = models.save_roles(tmp_path, (T5EncoderModel, config), whole, whole)
        for folder in roles[1:]:  # T5 v1.1's
            models.edit(folder, lambda tensors: tensors | {"lm_head.weight": torch.rand(50, 16)})
        transfer(*roles, tmp_path / "out")
        target, found = models.load(roles[2]), models.load(tmp_path / "out")
        assert torch.equal(found["lm_head.weight"], target["lm_head.weight"])


def test_a_kept_head_is_told_of(tmp_path):
    roles = resnets(tmp_path)
    models.edit(roles[2], lambda tensors: tensors | {"qa_outputs.weight": torch.rand(2, 16)})
    report = transfer(*roles, tmp_path / "out", added="drop")
    assert any(
        "whose head finetuned does not have: 1 tensor (qa_outputs" in n for n in report.notes
    )
