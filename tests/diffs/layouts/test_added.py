"""Heads that fine-tuning added are brought whole, dropped or refused; the graft loads."""

import json
import shutil

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from diffxfer import apply_diff, extract_diff, inspect_checkpoint, transfer, verify
from diffxfer.errors import DamageError, MatchError, OptionError
from tests import tiny
from tests.diffs.layouts import models
from tests.families import llama

ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}}
LABELS["label2id"] = {name: number for number, name in LABELS["id2label"].items()}
BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
    "forced_eos_token_id": None,
}
DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
GPT2 |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
TIED = {"tie_word_embeddings": True, "pad_token_id": 0}
UNTIED = {"tie_word_embeddings": False, "pad_token_id": 0}

MODERN = ENCODER | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

KINDS = {
    "roberta classifier": (
        (RobertaForSequenceClassification, RobertaConfig(**ENCODER, **LABELS)),
        (RobertaForMaskedLM, RobertaConfig(**ENCODER)),
    ),
    "roberta classifier of a bare base": (
        (RobertaForSequenceClassification, RobertaConfig(**ENCODER, **LABELS)),
        (RobertaModel, RobertaConfig(**ENCODER)),
    ),
    "token classifier": (
        (BertForTokenClassification, BertConfig(**ENCODER, **LABELS)),
        (BertForPreTraining, BertConfig(**ENCODER)),
    ),
    "answers": (
        (BertForQuestionAnswering, BertConfig(**ENCODER)),
        (BertForMaskedLM, BertConfig(**ENCODER)),
    ),
    "distilbert": (
        (DistilBertForSequenceClassification, DistilBertConfig(**DISTIL, **LABELS)),
        (DistilBertForMaskedLM, DistilBertConfig(**DISTIL)),
    ),
    "bart classifier": (
        (BartForSequenceClassification, BartConfig(**BART, **LABELS)),
        (BartForConditionalGeneration, BartConfig(**BART)),
    ),
    "modernbert": (  # a part of its head for words is the classifier's too
        (ModernBertForSequenceClassification, ModernBertConfig(**MODERN, **LABELS)),
        (ModernBertForMaskedLM, ModernBertConfig(**MODERN)),
    ),
    "reward model": (
        (LlamaForSequenceClassification, llama(num_labels=1, **UNTIED)),
        (LlamaForCausalLM, llama(**UNTIED)),
    ),
    "reward model of a tied base": (
        (LlamaForSequenceClassification, llama(num_labels=1, **TIED)),
        (LlamaForCausalLM, llama(**TIED)),
    ),
    "gpt-2 classifier of a bare base": (
        (GPT2ForSequenceClassification, GPT2Config(**GPT2, **LABELS)),
        (GPT2Model, GPT2Config(**GPT2)),
    ),
    "gpt-2 classifier": (
        (GPT2ForSequenceClassification, GPT2Config(**GPT2, **LABELS)),
        (GPT2LMHeadModel, GPT2Config(**GPT2)),
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    tuned, base = KINDS[request.param]
    root = tmp_path_factory.mktemp("added")
    return tuned[0], models.save_roles(root, tuned, base, base)


def bare(name):
    for prefix in ("roberta.", "transformer."):
        name = name.removeprefix(prefix)
    return name


def expected_of(roles):
    """Body by body and heads whole, under the names that finetuned's own class has."""
    finetuned, base, target = map(models.load, roles)
    base, target = ({bare(n): t for n, t in m.items()} for m in (base, target))
    return {
        name: models.graft_of(tensor, base[bare(name)], target[bare(name)])
        if bare(name) in base
        else tensor
        for name, tensor in finetuned.items()
    }


def outputs(model):
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        found = model(input_ids=ids)
    first = found["logits"] if "logits" in found else found["start_logits"]
    return first if torch.is_tensor(first) else first[0]


def assert_brought(model_class, roles, out):
    """It loads without new weights, and computes the same as an independent sum."""
    model = models.load_clean(model_class, out)
    expected = model_class.from_pretrained(roles[0])
    state = expected.state_dict()
    for name, tensor in expected_of(roles).items():
        assert name in state, name
        state[name] = tensor
    expected.load_state_dict(state)
    expected.eval()
    loaded = model.state_dict()
    different = [name for name in state if not torch.equal(loaded[name], state[name])]
    assert not different
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-5, atol=1e-6)


class TestBring:
    def test_transfer(self, kind, tmp_path):
        model_class, roles = kind
        report = transfer(*roles, tmp_path / "out", added="bring")
        assert_brought(model_class, roles, tmp_path / "out")
        assert report.tensors["brought"] >= 1
        assert not report.warnings

    def test_through_a_diff_vector(self, kind, tmp_path):
        model_class, roles = kind
        extract_diff(*roles[:2], tmp_path / "diff", diff_dtype="float64", added="bring")
        finetuned, stored = models.load(roles[0]), models.load(tmp_path / "diff")
        manifest = json.loads((tmp_path / "diff" / "diffxfer.json").read_text())
        whole = manifest["added_tensors"]
        assert whole
        models.assert_equal({n: stored[n] for n in whole}, {n: finetuned[n] for n in whole})
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "out", added="bring")
        assert_brought(model_class, roles, tmp_path / "out")
        assert verify(tmp_path / "diff", base=roles[1], finetuned=roles[0]).restored

    def test_alpha_does_not_scale_it(self, kind, tmp_path):
        _, roles = kind
        transfer(*roles, tmp_path / "half", alpha=0.5, added="bring")
        transfer(*roles, tmp_path / "none", alpha=0.0, added="bring")
        finetuned = models.load(roles[0])
        halves, nones = models.load(tmp_path / "half"), models.load(tmp_path / "none")
        heads = [name for name in finetuned if bare(name) not in map(bare, models.load(roles[1]))]
        for name in heads:
            assert torch.equal(halves[name], finetuned[name])
            assert torch.equal(nones[name], finetuned[name])

    def test_the_config_says_what_the_head_is(self, kind, tmp_path):
        model_class, roles = kind
        transfer(*roles, tmp_path / "out", added="bring")
        ours, found = (
            json.loads((folder / "config.json").read_text())
            for folder in (roles[0], tmp_path / "out")
        )
        assert found["architectures"] == [model_class.__name__]
        for key in ("id2label", "label2id", "problem_type", "num_labels"):
            assert found.get(key) == ours.get(key)

    def test_settings_of_the_head(self, tmp_path):
        config = RobertaConfig(
            **ENCODER, **LABELS, classifier_dropout=0.3, problem_type="regression"
        )
        masked = RobertaForMaskedLM, RobertaConfig(**ENCODER, hidden_dropout_prob=0.2)
        roles = models.save_roles(
            tmp_path, (RobertaForSequenceClassification, config), masked, masked
        )
        transfer(*roles, tmp_path / "out", added="bring")
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert found["classifier_dropout"] == 0.3
        assert found["problem_type"] == "regression"
        assert found["hidden_dropout_prob"] == 0.2  # the target's: it is of the body


class TestRefuseAndDrop:
    def test_refused_by_default_naming_both(self, kind, tmp_path):
        _, roles = kind
        with pytest.raises(MatchError) as caught:
            transfer(*roles, tmp_path / "out")
        assert "is in finetuned only" in caught.value.problem
        assert "--added bring" in caught.value.remedy
        assert "--added drop" in caught.value.remedy
        with pytest.raises(MatchError, match="--added bring"):
            extract_diff(*roles[:2], tmp_path / "diff")

    def test_dropped(self, kind, tmp_path):
        _, roles = kind
        report = transfer(*roles, tmp_path / "out", added="drop")
        target = models.load(roles[2])
        found = models.load(tmp_path / "out")
        assert found.keys() == target.keys()
        finetuned = {bare(n): t for n, t in models.load(roles[0]).items()}
        base = {bare(n): t for n, t in models.load(roles[1]).items()}
        for name, tensor in target.items():
            inner = bare(name)
            expected = tensor
            if inner in finetuned:
                expected = models.graft_of(finetuned[inner], base[inner], tensor)
            assert torch.equal(found[name], expected), name
        assert any("because of --added drop" in note for note in report.notes)
        extract_diff(*roles[:2], tmp_path / "diff", diff_dtype="float64", added="drop")
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "applied")
        models.assert_equal(models.load(tmp_path / "applied"), found)

    def test_a_diff_vector_that_has_it_asks_again(self, kind, tmp_path):
        _, roles = kind
        extract_diff(*roles[:2], tmp_path / "diff", added="bring")
        with pytest.raises(MatchError, match=r"is in the diff vector only.*--added bring"):
            apply_diff(tmp_path / "diff", roles[2], tmp_path / "out")
        apply_diff(tmp_path / "diff", roles[2], tmp_path / "out", added="drop")
        assert models.load(tmp_path / "out").keys() == models.load(roles[2]).keys()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    tuned, base = KINDS["reward model"]
    return models.save_roles(tmp_path_factory.mktemp("rewards"), tuned, base, base)


def copies(roles, root):
    return [shutil.copytree(folder, root / folder.name) for folder in roles]


class TestStrictness:
    def test_a_tensor_inside_a_layer_is_no_head(self, rewards, tmp_path):
        roles = copies(rewards, tmp_path)
        name = "model.layers.0.self_attn.q_norm.weight"
        models.edit(roles[0], lambda tensors: tensors | {name: torch.ones(8)})
        with pytest.raises(MatchError, match=r"q_norm\.weight .* is in finetuned only"):
            transfer(*roles, tmp_path / "out", added="bring")

    def test_a_missing_norm_is_no_replaced_head(self, rewards, tmp_path):
        roles = copies(rewards, tmp_path)
        gone = "model.norm.weight"
        models.edit(roles[0], lambda tensors: {n: t for n, t in tensors.items() if n != gone})
        with pytest.raises(MatchError, match=r"model\.norm\.weight .* is in base and target only"):
            transfer(*roles, tmp_path / "out", added="bring")

    def test_a_missing_head_alone_is_refused_as_ever(self, tmp_path):
        whole = LlamaForCausalLM, llama(**UNTIED)
        roles = models.save_roles(tmp_path, whole, whole, whole)
        gone = "lm_head.weight"
        models.edit(roles[0], lambda tensors: {n: t for n, t in tensors.items() if n != gone})
        for added in ("refuse", "bring", "drop"):
            with pytest.raises(MatchError, match="lm_head"):
                transfer(*roles, tmp_path / "out", added=added)

    def test_nan_in_it_is_an_error(self, rewards, tmp_path):
        roles = copies(rewards, tmp_path)
        models.edit(roles[0], lambda t: t | {"score.weight": t["score.weight"] * float("nan")})
        with pytest.raises(Exception, match=r"score\.weight: NaN in finetuned at \[0, 0\]"):
            transfer(*roles, tmp_path / "out", added="bring")

    def test_a_target_of_another_kind(self, tmp_path):
        tuned, base = KINDS["reward model"]
        roles = models.save_roles(tmp_path, tuned, base, base)
        models.edit_config(roles[2], model_type="mistral")
        with pytest.raises(Exception, match="model_type is 'llama', but the target's is 'mistral'"):
            transfer(*roles, tmp_path / "out", added="bring")

    def test_an_unknown_choice(self, rewards, tmp_path):
        with pytest.raises(OptionError, match="use one of refuse, bring, drop"):
            transfer(*rewards, tmp_path / "out", added="carry")

    def test_left_out_by_the_user_it_is_not_asked_for(self, rewards, tmp_path):
        report = transfer(*rewards, tmp_path / "out", exclude=["score", "lm_head"])
        assert models.load(tmp_path / "out").keys() == models.load(rewards[2]).keys()
        assert "brought" not in report.tensors

    def test_another_head_than_finetuned_s_is_noticed(self, rewards, tmp_path):
        roles = copies(rewards, tmp_path)
        extract_diff(*roles[:2], tmp_path / "diff", added="bring")
        models.edit(roles[0], lambda t: t | {"score.weight": t["score.weight"] + 1})
        with pytest.raises((MatchError, DamageError), match=r"score\.weight"):
            verify(tmp_path / "diff", base=roles[1], finetuned=roles[0])

    def test_inspect_does_not_take_it_for_a_difference(self, rewards, tmp_path):
        extract_diff(*rewards[:2], tmp_path / "diff", added="bring")
        assert not inspect_checkpoint(tmp_path / "diff").warnings


def test_a_successor_s_own_head_of_that_name_is_replaced(rewards, tmp_path):
    roles = copies(rewards, tmp_path)
    other = {"score.weight": torch.rand(5, 16)}
    models.edit(roles[2], lambda tensors: tensors | other)
    transfer(*roles, tmp_path / "out", added="bring")
    found, ours = models.load(tmp_path / "out"), models.load(roles[0])
    assert torch.equal(found["score.weight"], ours["score.weight"])
    models.load_clean(LlamaForSequenceClassification, tmp_path / "out")


class ValueHead(torch.nn.Module):
    """As TRL's: a line for the value of each token."""

    def __init__(self, width):
        super().__init__()
        self.summary = torch.nn.Linear(width, 1)


class LlamaForCausalLMWithValueHead(LlamaForCausalLM):
    """What TRL saves: the model's own tensors, and ``v_head.summary`` beside them."""

    def __init__(self, config):
        super().__init__(config)
        self.v_head = ValueHead(config.hidden_size)


def test_a_value_head(tmp_path):
    """It is beside the language-model head, which stays and is grafted as usual."""
    valued, whole = LlamaForCausalLMWithValueHead, LlamaForCausalLM
    config = llama(**UNTIED)
    roles = models.save_roles(tmp_path, (valued, config), (whole, config), (whole, config))
    finetuned, base, target = map(models.load, roles)
    assert {"v_head.summary.weight", "v_head.summary.bias"} == finetuned.keys() - base.keys()
    report = transfer(*roles, tmp_path / "out", added="bring")
    assert report.tensors == {"grafted": len(target), "brought": 2}
    expected = {
        name: models.graft_of(tensor, base[name], target[name]) if name in base else tensor
        for name, tensor in finetuned.items()
    }
    models.assert_equal(models.load(tmp_path / "out"), expected)
    models.load_clean(valued, tmp_path / "out")


def test_by_the_command_line(rewards, tmp_path):
    argv = ["transfer", *rewards, "-o", tmp_path / "out"]
    refused = tiny.run(*argv)
    assert refused.status == 1
    assert "carry over what fine-tuning added, such as score.weight, with --added bring" in (
        refused.err
    )
    done = tiny.run(*argv, "--added", "bring", summary=True)
    assert done.status == 0
    assert "brought from finetuned, whole and unscaled: 1 tensor (score.weight)" in done.err


def test_a_head_that_base_has_under_one_more_prefix_is_not_added(tmp_path):
    """One prefix pairs the layers and not the head: it is refused, not brought whole."""
    whole = BertForMaskedLM, BertConfig(**ENCODER)
    roles = models.save_roles(tmp_path, whole, whole, whole)
    models.rename(roles[1], lambda n: "thinker." + n.replace("bert.", "inner.bert."))
    with pytest.raises(MatchError, match=r"cls\.predictions\.\S+ .* is in finetuned"):
        transfer(*roles, tmp_path / "out", added="bring")
