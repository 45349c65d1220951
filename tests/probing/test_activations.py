"""How much the target's layers change, against explicit matrices on inputs captured by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from diffxfer.errors import DataError, EvaluationError
from diffxfer.family import family_folder
from diffxfer.probing.activations import (
    activation_ratio,
    linear_ratios,
    shipped_text,
    text_rows,
)

ROWS = [[1, 5, 9, 2, 7], [3, 3, 8], [4]]


def llama(seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        **changes,
    )
    return LlamaForCausalLM(config)


def gpt2(seed: int) -> Any:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=12, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    )


def bert(seed: int) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return BertForMaskedLM(config)


def by_hand(base: Any, target: Any) -> dict[str, float]:
    """Each layer's ratio in float64, token by token, from the inputs of one run a row."""
    base.eval()
    captured: dict[str, list[torch.Tensor]] = {}
    found = {
        name: module
        for name, module in base.base_model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, __, name=name: captured.setdefault(name, []).extend(
                inputs[0].reshape(-1, inputs[0].shape[-1]).detach().double()
            )
        )
        for name, module in found.items()
    ]
    with torch.no_grad():
        for row in ROWS:
            base(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    ratios = {}
    for name, tokens in captured.items():
        matrices = []
        for model in (base, target):
            module = model.base_model.get_submodule(name)
            weight = module.weight.detach().double()
            matrices.append(weight.T if isinstance(module, Conv1D) else weight)
        b, t = matrices
        changed = sum(float((((t - b) @ x) ** 2).sum()) for x in tokens)
        computed = sum(float(((b @ x) ** 2).sum()) for x in tokens)
        ratios[name] = math.sqrt(changed / computed)
    return ratios


@pytest.mark.parametrize(("make", "linears"), [(llama, 14), (gpt2, 8), (bert, 12)])
def test_it_equals_explicit_matrices(make: Any, linears: int) -> None:
    base, target = make(0), make(1)
    measured = activation_ratio(base, target, ROWS)
    expected = by_hand(base, target)
    assert len(expected) == linears
    assert {each.name: each.ratio for each in measured.layers} == pytest.approx(expected, rel=1e-5)
    assert measured.mean == pytest.approx(sum(expected.values()) / linears, rel=1e-5)
    assert measured.tokens == 9
    assert measured.left_out == ()
    # The same figures again: nothing is left on the models, and nothing is random.
    assert activation_ratio(base, target, ROWS) == measured


def test_the_first_projection_from_the_embedding() -> None:
    base, target = llama(0), llama(1)
    x = base.model.embed_tokens.weight[[token for row in ROWS for token in row]].detach().double()
    x = x / (x.square().mean(1, keepdim=True) + base.config.rms_norm_eps).sqrt()
    b, t = (
        model.model.layers[0].self_attn.k_proj.weight.detach().double() for model in (base, target)
    )
    expected = ((t - b) @ x.T).norm() / (b @ x.T).norm()
    measured = {e.name: e for e in activation_ratio(base, target, ROWS).layers}
    first = measured["layers.0.self_attn.k_proj"]
    assert first.ratio == pytest.approx(float(expected), rel=1e-5)
    assert (first.layer, first.kind) == (0, "k")


def test_layers_and_kinds_are_means_of_the_linear_layers() -> None:
    base, target = llama(0), llama(0)
    with torch.no_grad():
        target.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    measured = activation_ratio(base, target, ROWS)
    assert measured.by_layer() == pytest.approx({0: 0.0, 1: 0.5 / 7})
    assert measured.by_kind()["down"] == pytest.approx(0.25)
    assert measured.mean == pytest.approx(0.5 / 14)
    told = json.loads(json.dumps(measured.as_json(), allow_nan=False))
    assert told["by_layer"] == [[0, 0.0], [1, pytest.approx(0.5 / 7)]]
    assert told["layers"][-1]["name"] == "layers.1.mlp.down_proj"


def test_biases_count_only_when_asked() -> None:
    base, target = gpt2(0), gpt2(0)
    with torch.no_grad():
        target.transformer.h[0].mlp.c_fc.bias.add_(1.0)
    name = "h.0.mlp.c_fc"
    assert activation_ratio(base, target, ROWS).mean == 0
    ratios, _ = linear_ratios(base.transformer, target.transformer, ROWS, biases=True)
    assert ratios[name] > 0.5
    assert sum(ratios.values()) == ratios[name]


def test_dropout_is_off_and_training_goes_on() -> None:
    base, target = bert(0), bert(1)
    base.eval()
    expected = activation_ratio(base, target, ROWS)
    base.train()
    assert activation_ratio(base, target, ROWS) == expected
    assert base.training
    assert base.bert.encoder.layer[0].attention.self.dropout.training


def test_bfloat16_models_are_compared_in_float32() -> None:
    base, target = llama(0).bfloat16(), llama(0).bfloat16()
    with torch.no_grad():
        weight = target.model.layers[0].mlp.up_proj.weight
        weight.mul_(1 + 2**-7)
    measured = activation_ratio(base, target, ROWS)
    up = next(e.ratio for e in measured.layers if e.name == "layers.0.mlp.up_proj")
    # Each weight moved by one step of bfloat16 or none, of between 2^-8 and 2^-7 of itself.
    assert 2**-8 < up < 2**-6


def test_fused_experts_are_not_covered() -> None:
    def mixtral(seed: int) -> Any:
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
            max_position_embeddings=16,
        )
        return MixtralForCausalLM(config)

    measured = activation_ratio(mixtral(0), mixtral(1), ROWS)
    attention, experts, router = 4 * 16 * 16, 4 * 3 * 16 * 24, 4 * 16
    assert measured.covered == pytest.approx(attention / (attention + experts + router))
    assert activation_ratio(llama(0), llama(1), ROWS).covered == 1.0


def test_a_layer_that_computes_zeros_is_infinitely_far() -> None:
    base, target = llama(0), llama(1)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.zero_()
    measured = activation_ratio(base, target, ROWS)
    assert math.isinf(measured.mean)
    assert measured.as_json()["mean"] is None
    json.dumps(measured.as_json(), allow_nan=False)


def test_layers_that_the_target_lacks_are_named() -> None:
    base, target = llama(0), llama(1)
    del target.model.layers[1]
    measured = activation_ratio(base, target, ROWS)
    assert len(measured.layers) == 7
    assert len(measured.left_out) == 7
    assert measured.left_out[0] == "layers.1.self_attn.q_proj"
    assert measured.covered == 0.5


def test_errors_are_one_line() -> None:
    with pytest.raises(DataError, match="no token"):
        activation_ratio(llama(0), llama(1), [[], []])
    with pytest.raises(EvaluationError, match="none of base's 14 linear layers") as nothing:
        activation_ratio(llama(0), gpt2(0), ROWS)
    wider = LlamaForCausalLM(LlamaConfig(**{**llama(0).config.to_dict(), "intermediate_size": 32}))
    with pytest.raises(EvaluationError, match=r"is \(24, 16\) in base and \(32, 16\)") as shape:
        activation_ratio(llama(0), wider, ROWS)
    assert "\n" not in str(nothing.value) + str(shape.value)


class _Words:
    def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        assert not verbose
        return {"input_ids": [len(word) for word in text.split()]}


def test_the_shipped_text_is_cut_into_rows() -> None:
    text = shipped_text()
    assert 3_000 < len(text) < 5_000
    assert text.isascii()
    rows = text_rows(_Words(), row_tokens=100)
    assert [len(row) for row in rows[:-1]] == [100] * (len(rows) - 1)
    assert [token for row in rows for token in row] == [len(word) for word in text.split()]
    assert text_rows(_Words(), "a bc") == [[1, 2]]


def test_the_shipped_family_and_text(caplog: pytest.LogCaptureFixture) -> None:
    folder = family_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base, target = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("base", "target")
    )
    rows = text_rows(tokenizer)
    # Its tokens are bytes, and one begins the text.
    assert sum(map(len, rows)) == len(shipped_text()) + 1
    assert "longer than the specified maximum" not in caplog.text
    measured = activation_ratio(base, target, rows[:4])
    assert 0.1 < measured.mean < 0.25
    assert set(measured.by_kind()) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert set(measured.by_layer()) == {0, 1, 2, 3}
    assert measured.covered == 1
