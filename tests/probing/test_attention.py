"""Attention of corresponding heads, compared with loops over what transformers itself returns."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as cosine_distance
from scipy.spatial.distance import jensenshannon

from diffxfer.errors import OptionError
from diffxfer.probing.attention import compare_attention
from tests.probing.small_models import ROWS, make, member, pair, text_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

CAUSAL = ("llama", "qwen3", "mistral", "gpt2", "bloom", "mpt")
BOTH_WAYS = ("bert", "roberta", "albert", "bert classifier")
QUICK = ("llama", "mistral", "gpt2", "bert", "roberta", "albert", "llama classifier")
WINDOW = 4


def attentions(model: PreTrainedModel, row: list[int]) -> list[np.ndarray]:
    """The attention that a separate eager copy returns for a row alone, by layer."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    own.eval()
    with torch.no_grad():
        found = own(torch.tensor([row]), output_attentions=True).attentions
    return [layer[0].double().numpy() for layer in found]


def measure(measured: Callable[[Any, Any], float], models: Any, rows: Any, kind: str) -> dict:
    """A similarity for each pair of heads and for uniform attention, with loops."""
    pairs: dict[tuple[int, int, int], list[float]] = {}
    uniform: list[float] = []
    for row in rows:
        ours, theirs = (attentions(model, row) for model in models)
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            for query in range(len(row)):
                seen = range(len(row)) if kind in BOTH_WAYS else range(query + 1)
                if kind == "mistral":
                    seen = range(max(0, query - WINDOW + 1), query + 1)
                if len(seen) < 2:
                    continue
                even = np.zeros(len(row))
                even[list(seen)] = 1 / len(seen)
                for i in range(len(a)):
                    uniform += [measured(a[i, query], even), measured(b[i, query], even)]
                    for j in range(len(b)):
                        value = measured(a[i, query], b[j, query])
                        pairs.setdefault((layer, i, j), []).append(value)
    means = {key: float(np.mean(values)) for key, values in pairs.items()}
    layers, heads = (max(key[place] for key in means) + 1 for place in (0, 1))
    return {
        "layers": [[means[layer, i, i] for i in range(heads)] for layer in range(layers)],
        "mean": np.mean([value for (_, i, j), value in means.items() if i == j]),
        "other_heads": np.mean([value for (_, i, j), value in means.items() if i != j]),
        "uniform": np.mean(uniform),
    }


def cosine(p: np.ndarray, q: np.ndarray) -> float:
    return float(1 - cosine_distance(p, q))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float(1 - jensenshannon(p, q, base=2) ** 2)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert np.array(found["layers"]) == pytest.approx(np.array(expected["layers"]), abs=1e-6)
    for key in ("mean", "other_heads", "uniform"):
        assert found[key] == pytest.approx(expected[key], abs=1e-6), key


@pytest.mark.parametrize("kind", QUICK)
def test_equals_loops_over_the_weights_that_transformers_returns(kind: str) -> None:
    models, rows = pair(kind), ROWS[:4]
    found = compare_attention(*models, rows).as_json()
    check(found, measure(cosine, models, rows, kind))
    check(found["jensen_shannon"], measure(divergence, models, rows, kind))
    both_ways = kind in BOTH_WAYS
    assert found["positions"] == sum(len(row) - (not both_ways) for row in rows)


def test_equals_loops_on_the_shipped_family() -> None:
    models, rows = (member("finetuned"), member("direct")), text_rows()[:1]
    rows = [rows[0][:40]]
    found = compare_attention(*models, rows).as_json()
    check(found, measure(cosine, models, rows, "llama"))
    check(found["jensen_shannon"], measure(divergence, models, rows, "llama"))


@pytest.mark.parametrize("kind", [*CAUSAL, *BOTH_WAYS, "llama classifier"])
def test_a_model_equals_itself(kind: str) -> None:
    model = make(kind)
    found = compare_attention(model, model, ROWS)
    assert found.cosine is not None
    assert found.jensen_shannon is not None
    for measured in (found.cosine, found.jensen_shannon):
        assert np.array(measured.layers) == pytest.approx(1, abs=1e-12)
        assert measured.other_heads is not None
        assert measured.other_heads < 0.95
        assert measured.uniform < 0.95


@pytest.mark.parametrize("kind", [*CAUSAL, *BOTH_WAYS, "qwen3 next"])
def test_order_of_models_batches_and_memory_change_nothing(kind: str) -> None:
    a, b = pair(kind)
    expected = compare_attention(a, b, ROWS).as_json()
    for changed in (
        compare_attention(b, a, ROWS),
        compare_attention(a, b, ROWS, batch_size=1),
        compare_attention(a, b, ROWS, held_bytes=1),
        compare_attention(a, b, ROWS[::-1], batch_size=2),
    ):
        check(changed.as_json(), expected)
        check(changed.as_json()["jensen_shannon"], expected["jensen_shannon"])


def test_more_than_five_heads_sample_pairs_alike_in_both_orders() -> None:
    a, b = (make("gpt2", seed, n_head=8) for seed in (0, 1))
    one, two = (compare_attention(*models, ROWS).jensen_shannon for models in ((a, b), (b, a)))
    assert one is not None
    assert two is not None
    assert one.other_heads == pytest.approx(two.other_heads, abs=1e-9)
    assert one.other_heads_by_layer == pytest.approx(two.other_heads_by_layer, abs=1e-9)


def test_one_head_has_no_other_heads() -> None:
    found = compare_attention(make("gpt2", n_head=1), make("gpt2", 1, n_head=1), ROWS).as_json()
    assert found["other_heads"] is None
    assert found["jensen_shannon"]["other_heads"] is None
    assert found["mean"] < 1


def test_the_permuted_copy_is_a_baseline() -> None:
    model = make("gpt2", n_head=2)
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        for block in permuted.transformer.h:
            attention = block.attn
            order = torch.cat((torch.arange(8, 16), torch.arange(8)))
            columns = torch.cat([order + 16 * part for part in range(3)])
            attention.c_attn.weight.copy_(attention.c_attn.weight[:, columns])
            attention.c_attn.bias.copy_(attention.c_attn.bias[columns])
            attention.c_proj.weight.copy_(attention.c_proj.weight[order])
    itself = compare_attention(model, model, ROWS)
    found = itself.with_permuted(compare_attention(model, permuted, ROWS)).as_json()
    # The two heads have changed places, so each meets the other one.
    assert found["permuted"] == pytest.approx(found["other_heads"], abs=1e-6)
    similarity = found["jensen_shannon"]
    assert similarity["permuted"] == pytest.approx(similarity["other_heads"], abs=1e-6)
    assert found["mean"] == pytest.approx(1)


def test_some_layers() -> None:
    a, b = (make("llama", seed, num_hidden_layers=4) for seed in (0, 1))
    every = compare_attention(a, b, ROWS).as_json()
    last = compare_attention(a, b, ROWS, layers=2).as_json()
    assert last["sampled_layers"] == [2, 3]
    assert last["attention_layers"] == 4
    assert last["layers"] == every["layers"][2:]
    some = compare_attention(a, b, ROWS, layers=[3, 0]).as_json()
    assert some["sampled_layers"] == [0, 3]
    assert some["layers"] == [every["layers"][0], every["layers"][3]]
    for wrong in (0, [4], []):
        with pytest.raises(OptionError, match="layers: expected"):
            compare_attention(a, b, ROWS, layers=wrong)


def test_layers_without_attention_are_passed_over() -> None:
    found = compare_attention(*pair("qwen3 next"), ROWS).as_json()
    assert found["sampled_layers"] == [1]
    assert len(found["layers"]) == 1


def test_the_models_are_left_as_they_were() -> None:
    a, b = make("mpt"), make("llama")
    a.train()
    b.eval()
    b.model.layers[0].train()  # type: ignore[union-attr]
    kinds = [(model.config._attn_implementation) for model in (a, b)]
    inner = a.config.attn_config._attn_implementation
    for first, second in ((a, a), (b, b)):
        assert compare_attention(first, second, ROWS).reason is None
    assert [(model.config._attn_implementation) for model in (a, b)] == kinds
    assert kinds[1] == "sdpa"
    assert a.config.attn_config._attn_implementation == inner
    assert a.training
    assert not b.training
    assert b.model.layers[0].training  # type: ignore[union-attr]


def test_how_much_text_is_used() -> None:
    a, b = pair("llama")
    found = compare_attention(a, b, ROWS, tokens=18, row_tokens=10)
    # 10 of the first row, 7 of the second, 10 of the third.
    assert (found.rows, found.tokens, found.positions) == (3, 27, 24)
    long = [list(range(2, 50)) * 3]
    assert compare_attention(a, b, long).tokens == 64, "as many as the model has positions"
    roberta = pair("roberta")
    assert compare_attention(*roberta, long).tokens == 62


REASONS = [
    ("mamba", "mamba", ROWS, "a has no attention weights"),
    ("llama", "mamba", ROWS, "b has no attention weights"),
    ("longformer", "longformer", ROWS, "a has attention weights of another form"),
    ("t5", "t5", ROWS, "a is an encoder-decoder model"),
    ("llama", "llama", [], "no row has two tokens or more"),
    ("llama", "llama", [[3], [4]], "no row has two tokens or more"),
    ("llama", "llama", [[3, 50]], "the rows have the token 50, and a has an embedding of 50"),
]


@pytest.mark.parametrize(("first", "second", "rows", "reason"), REASONS)
def test_reasons(first: str, second: str, rows: list[list[int]], reason: str) -> None:
    found = compare_attention(make(first), make(second), rows)
    assert found.reason is not None
    assert found.reason.startswith(reason)
    assert found.cosine is None
    assert found.as_json()["layers"] == []
    assert found.as_json()["mean"] is None
    assert found.with_permuted(found) == found


def test_heads_that_do_not_correspond() -> None:
    a, b = make("llama"), make("llama", num_attention_heads=2)
    assert compare_attention(a, b, ROWS, names=("graft", "direct")).reason == (
        "no heads correspond: graft has 2 layers of 4 heads, direct has 2 layers of 2 heads"
    )
    deeper = make("llama", num_hidden_layers=3)
    assert "3 layers of 4 heads" in (compare_attention(a, deeper, ROWS).reason or "")


def test_activations_that_overflow() -> None:
    model = make("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    found = compare_attention(model, model, ROWS)
    assert found.reason == "the attention of a model is not finite on these rows"


def test_the_shipped_family_and_its_baselines() -> None:
    means = {}
    for pair_names in (("finetuned", "direct"), ("base", "target"), ("finetuned", "base")):
        models = [member(name) for name in pair_names]
        found = compare_attention(*models, text_rows(), names=pair_names, tokens=1024)
        assert json.loads(json.dumps(found.as_json())) == found.as_json()
        assert found.as_json()["pair"] == list(pair_names)
        assert found.cosine is not None
        assert found.cosine.other_heads is not None
        means[pair_names] = found.cosine.mean
        assert found.cosine.mean > 0.8
        assert found.cosine.other_heads < 0.45
        assert found.cosine.uniform < 0.45
    assert max(means, key=lambda key: means[key]) == ("base", "target")
