"""Heads of other shapes: in numbered layers, with buffers, beside the head for words."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from diffxfer import apply_diff, extract_diff, transfer, verify
from diffxfer.errors import MatchError, VocabularyError
from tests import families
from tests.diffs.layouts import models
from tests.diffs.layouts.test_added import (
    ENCODER,
    LABELS,
    TIED,
    UNTIED,
    LlamaForCausalLMWithValueHead,
)
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
        "since finetuned does not have this head: 1 tensor (qa_outputs" in n for n in report.notes
    )


SEGMENTS = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 3,
}
STATISTICS = [f"decode_head.batch_norm.{s}" for s in ("running_mean", "running_var")]


class TestBuffersOfHeads:
    """Segformer's head normalizes by statistics of its own: without them it is another head."""

    def roles(self, root, target):
        config = SegformerConfig(**SEGMENTS)
        base = SegformerForImageClassification, config
        roles = models.save_roles(
            root, (SegformerForSemanticSegmentation, config), base, (target, config)
        )
        counted = dict.fromkeys(STATISTICS, torch.full((16,), 0.5))
        models.edit(roles[0], lambda tensors: tensors | counted)
        return roles

    @pytest.mark.parametrize(
        "target", [SegformerForImageClassification, SegformerForSemanticSegmentation]
    )
    def test_brought(self, tmp_path, target):
        roles = self.roles(tmp_path, target)
        transfer(*roles, tmp_path / "out", added="bring")
        extract_diff(*roles[:2], tmp_path / "diff", diff_dtype="float64", added="bring")
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "applied", added="bring")
        finetuned, found = models.load(roles[0]), models.load(tmp_path / "out")
        models.assert_equal(models.load(tmp_path / "applied"), found)
        head = {name for name in finetuned if name.startswith("decode_head.")}
        assert {*STATISTICS, "decode_head.linear_c.0.proj.weight"} <= head
        models.assert_equal({n: found[n] for n in head}, {n: finetuned[n] for n in head})
        models.load_clean(SegformerForSemanticSegmentation, tmp_path / "out")
        assert verify(tmp_path / "diff", base=roles[1], finetuned=roles[0]).restored

    def test_those_of_a_head_that_is_replaced_go_too(self, tmp_path):
        _, base, target = self.roles(tmp_path, SegformerForSemanticSegmentation)
        config = SegformerConfig(**SEGMENTS)
        bare = models.save(tmp_path / "bare", SegformerModel, config, 4)
        transfer(base, bare, target, tmp_path / "out", added="bring")
        models.load_clean(SegformerForImageClassification, tmp_path / "out")

    def test_those_of_the_body_are_not_brought(self, tmp_path):
        """Base has bare names, and finetuned a pooler within the body's module."""
        config = BertConfig(**ENCODER)
        tuned = BertForSequenceClassification, BertConfig(**ENCODER, **LABELS)
        roles = models.save_roles(tmp_path, tuned, (BertModel, config), (BertModel, config))
        for folder in roles[1:]:
            models.edit(folder, lambda t: {n: x for n, x in t.items() if "pooler" not in n})
        positions = {"bert.embeddings.position_ids": torch.arange(40)[None]}
        models.edit(roles[0], lambda tensors: tensors | positions)
        transfer(*roles, tmp_path / "out", added="bring")
        assert not positions.keys() & models.load(tmp_path / "out").keys()
        models.load_clean(BertForSequenceClassification, tmp_path / "out")


class TestAValueHeadBesideWords:
    """The language-model head stays, tied or not, if finetuned is a language model."""

    @pytest.mark.parametrize("settings", [TIED, UNTIED], ids=["tied target", "untied target"])
    def test_of_a_tied_model(self, tmp_path, settings):
        tied, target = llama(**TIED), llama(**settings)
        roles = models.save_roles(
            tmp_path,
            (LlamaForCausalLMWithValueHead, tied),
            (LlamaForCausalLM, tied),
            (LlamaForCausalLM, target),
        )
        transfer(*roles, tmp_path / "out", added="bring")
        extract_diff(*roles[:2], tmp_path / "diff", diff_dtype="float64", added="bring")
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "applied", added="bring")
        found = models.load(tmp_path / "out")
        models.assert_equal(models.load(tmp_path / "applied"), found)
        assert found.keys() - models.load(roles[2]).keys() == {
            "v_head.summary.weight",
            "v_head.summary.bias",
        }
        models.load_clean(LlamaForCausalLMWithValueHead, tmp_path / "out")

    @pytest.mark.parametrize("added", ["bring", "drop"])
    def test_that_lost_its_words_is_refused(self, tmp_path, added):
        whole = LlamaForCausalLM, llama(**UNTIED)
        roles = models.save_roles(
            tmp_path, (LlamaForCausalLMWithValueHead, llama(**UNTIED)), whole, whole
        )
        models.edit(roles[0], lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
        with pytest.raises(MatchError, match=r"lm_head\.weight .* is in base and target only"):
            transfer(*roles, tmp_path / "out", added=added)
        with pytest.raises(MatchError, match=r"lm_head\.weight .* is in base only"):
            extract_diff(*roles[:2], tmp_path / "diff", added=added)


class TestHeadsForWords:
    """Rows of a head belong to tokens, as those of an embedding."""

    WORDS = tuple(f"w{i}" for i in range(50))

    def roles(self, root, order):
        config = BertConfig(**ENCODER)
        bare = BertModel, config
        roles = models.save_roles(root, (BertForMaskedLM, config), bare, bare)
        for folder, words in zip(roles, (self.WORDS, self.WORDS, order), strict=True):
            families.save_tokenizer(folder, families.fast_tokenizer(words=words))
        return roles

    def test_brought_where_tokens_keep_their_ids(self, tmp_path):
        roles = self.roles(tmp_path, self.WORDS)
        transfer(*roles, tmp_path / "out", added="bring")
        finetuned, found = models.load(roles[0]), models.load(tmp_path / "out")
        assert torch.equal(found["cls.predictions.bias"], finetuned["cls.predictions.bias"])
        models.load_clean(BertForMaskedLM, tmp_path / "out")

    def test_refused_where_tokens_have_other_ids(self, tmp_path):
        roles = self.roles(tmp_path, (*self.WORDS[:10], *self.WORDS[:9:-1]))
        with pytest.raises(VocabularyError, match=r"cls\.predictions\.bias: .*other ids"):
            transfer(*roles, tmp_path / "out", added="bring")
        extract_diff(*roles[:2], tmp_path / "diff", added="bring")
        with pytest.raises(VocabularyError, match=r"cls\.predictions\.bias: .*other ids"):
            apply_diff(tmp_path / "diff", roles[2], tmp_path / "out", added="bring")
        transfer(*roles, tmp_path / "out", added="drop")

    def test_refused_where_the_target_has_more_rows(self, tmp_path):
        roles = self.roles(tmp_path, self.WORDS)
        models.edit(
            roles[2],
            lambda tensors: {
                n: torch.cat([t, t[:6]]) if "word_embeddings" in n else t
                for n, t in tensors.items()
            },
        )
        models.edit_config(roles[2], vocab_size=56)
        with pytest.raises(VocabularyError, match="the output has 56"):
            transfer(*roles, tmp_path / "out", added="bring")


def test_ids_of_tokens_are_no_settings_of_a_head(tmp_path):
    roles = resnets(tmp_path)
    for folder, number in zip(roles, (7, 8, 9), strict=True):
        models.edit_config(folder, cls_token_id=number)
    transfer(*roles, tmp_path / "out", added="bring")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["cls_token_id"] == 9
