"""Linear CKA of hidden states, compared with numpy on all tokens at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from diffxfer.errors import OptionError
from diffxfer.probing.hidden import compare_hidden
from tests.probing.small_models import ROWS, make, member, pair, text_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("llama", "qwen3", "gpt2", "bert", "roberta", "mamba", "llama classifier")


def states(model: PreTrainedModel, rows: list[list[int]]) -> list[list[np.ndarray]]:
    """For each layer, the hidden states of each row alone, without the first token."""
    model.eval()
    found = []
    with torch.no_grad():
        for row in rows:
            outputs = model(torch.tensor([row]), output_hidden_states=True)
            found.append([state[0, 1:].double().numpy() for state in outputs.hidden_states])
    return [list(layer) for layer in zip(*found, strict=True)]


def by_samples(x: np.ndarray, y: np.ndarray) -> float:
    """CKA from the products of tokens with tokens, which is the same number."""
    k, m = x - x.mean(0), y - y.mean(0)
    k, m = k @ k.T, m @ m.T
    return float((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m))


def displaced(rows: list[np.ndarray]) -> np.ndarray:
    moved = []
    for row in rows:
        order = list(range(len(row)))
        half = len(row) // 2
        for place in range(half):
            order[place], order[place + half] = place + half, place
        moved.append(row[order])
    return np.concatenate(moved)


def check(models: tuple[PreTrainedModel, PreTrainedModel], rows: list[list[int]]) -> None:
    found = compare_hidden(*models, rows)
    ours, theirs = (states(model, rows) for model in models)
    layers, others = [], []
    for a, b in zip(ours, theirs, strict=True):
        layers.append(by_samples(np.concatenate(a), np.concatenate(b)))
        others.append(by_samples(np.concatenate(a), displaced(b)))
    assert found.layers == pytest.approx(layers, abs=1e-6)
    assert found.mean == pytest.approx(np.mean(layers), abs=1e-6)
    assert found.other_tokens_by_layer == pytest.approx(others, abs=1e-6)
    assert found.other_tokens == pytest.approx(np.mean(others), abs=1e-6)
    assert found.sampled_layers == tuple(range(len(layers)))
    assert found.positions == sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy(kind: str) -> None:
    check(pair(kind), ROWS)


def test_equals_numpy_on_the_shipped_family() -> None:
    check((member("finetuned"), member("direct")), text_rows()[:4])


def test_hidden_sizes_may_differ() -> None:
    check((make("llama"), make("llama", 1, hidden_size=24)), ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_models_batches_and_memory_change_nothing(kind: str) -> None:
    a, b = pair(kind)
    expected = compare_hidden(a, b, ROWS)
    for changed in (
        compare_hidden(b, a, ROWS),
        compare_hidden(a, b, ROWS, batch_size=1),
        compare_hidden(a, b, ROWS, held_bytes=1),
        compare_hidden(a, b, ROWS[::-1], batch_size=2),
    ):
        assert changed.layers == pytest.approx(expected.layers, abs=1e-6)
        assert changed.other_tokens_by_layer == pytest.approx(
            expected.other_tokens_by_layer, abs=1e-6
        )


def test_a_model_equals_itself_and_a_turned_copy() -> None:
    model, turned = make("gpt2", n_layer=1), make("gpt2", n_layer=1)
    found = compare_hidden(model, model, ROWS)
    assert found.layers == pytest.approx([1, 1])
    # The embedding in other coordinates, three times as long.
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        for embedding in (turned.transformer.wte, turned.transformer.wpe):
            embedding.weight.copy_(3 * embedding.weight @ rotation)
    found = compare_hidden(model, turned, ROWS)
    assert found.layers[0] == pytest.approx(1, abs=1e-6)
    assert found.layers[1] is not None
    assert found.layers[1] < 0.9


def test_few_tokens_make_even_other_tokens_alike() -> None:
    # Why the baseline stands there: in 16 dimensions, four tokens are alike by chance.
    few = compare_hidden(*pair("llama"), [row[:5] for row in ROWS[:1]])
    many = compare_hidden(*pair("llama"), [list(range(2, 50)), list(range(49, 1, -1))] * 2)
    assert few.other_tokens is not None
    assert many.other_tokens is not None
    assert few.other_tokens > 0.4 > many.other_tokens


def test_some_layers() -> None:
    a, b = pair("llama")
    every = compare_hidden(a, b, ROWS)
    last = compare_hidden(a, b, ROWS, layers=1)
    assert (last.sampled_layers, last.layers) == ((2,), every.layers[2:])
    assert compare_hidden(a, b, ROWS, layers=[0]).layers == every.layers[:1]
    with pytest.raises(OptionError, match="layers: expected"):
        compare_hidden(a, b, ROWS, layers=[3])


def test_states_that_do_not_vary_have_no_figure() -> None:
    found = compare_hidden(*pair("llama"), [[7] * 10])
    assert found.layers[0] is None
    assert found.as_json()["layers"][0] is None


def test_reasons() -> None:
    llama = make("llama")
    assert compare_hidden(llama, make("llama", num_hidden_layers=3), ROWS).reason == (
        "no layers correspond: a has 2, b has 3"
    )
    reason = compare_hidden(make("t5"), make("t5"), ROWS).reason
    assert (reason or "").startswith("a is an encoder-decoder model")
    assert compare_hidden(llama, llama, []).reason == "no row has two tokens or more"
    with torch.no_grad():
        llama.get_input_embeddings().weight.fill_(float("inf"))
    found = compare_hidden(llama, make("llama"), ROWS)
    assert found.reason == "hidden states of a model are not finite"
    assert found.as_json()["mean"] is None


def test_the_shipped_family() -> None:
    names = ("base", "target")
    found = compare_hidden(member("base"), member("target"), text_rows(), names=names, tokens=2048)
    assert json.loads(json.dumps(found.as_json())) == found.as_json()
    assert found.mean is not None
    assert found.other_tokens is not None
    assert found.mean > 0.9
    assert found.other_tokens < 0.05
