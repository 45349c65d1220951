"""Agreement of predictions, compared with one row after the other through each model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from diffxfer.probing.agreement import Kind, compare_predictions, kind_of
from diffxfer.probing.shares import share_of, wilson
from tests.probing.small_models import ROWS, make, member, pair, text_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASK = 5


def best(model: PreTrainedModel, row: list[int]) -> list[int]:
    model.eval()
    with torch.no_grad():
        found = model(torch.tensor([row])).logits[0]
    return found.argmax(-1).reshape(-1).tolist()


def near(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and a copy that was moved a little, so that they agree now and then."""
    model, other = pair(kind)
    with torch.no_grad():
        mixture = zip(other.parameters(), model.parameters(), strict=True)
        for moved, parameter in mixture:
            moved.mul_(0.15).add_(0.85 * parameter)
    return model, other


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mamba"])
def test_causal_models_on_prompts(kind: str) -> None:
    a, b = near(kind)
    found = compare_predictions(a, b, ROWS)
    same = [[x == y for x, y in zip(best(a, row), best(b, row), strict=True)] for row in ROWS]
    assert found.next_token is not None
    assert found.first_token is not None
    assert (found.next_token.equal, found.next_token.counted) == (
        sum(map(sum, same)),
        sum(map(len, ROWS)),
    )
    assert 0 < found.next_token.share < 1
    firsts = sum(row[-1] for row in same)
    assert (found.first_token.equal, found.first_token.counted) == (firsts, len(ROWS))
    interval = binomtest(firsts, len(ROWS)).proportion_ci(method="wilson")
    assert found.first_token.interval == pytest.approx((interval.low, interval.high))


def test_causal_models_on_completions() -> None:
    a, b = near("llama")
    begins = [5, 3, 8, 1, 19, 12]  # the last row has no completion
    scored = [[place >= begin for place in range(len(row))] for row, begin in zip(ROWS, begins)]  # noqa: B905
    found = compare_predictions(a, b, ROWS, scored=scored)
    same = []
    for row, begin in zip(ROWS[:5], begins, strict=False):
        ours, theirs = best(a, row), best(b, row)
        same.append([ours[place - 1] == theirs[place - 1] for place in range(begin, len(row))])
    assert found.next_token is not None
    assert found.first_token is not None
    assert found.next_token.equal == sum(map(sum, same))
    assert found.next_token.counted == sum(map(len, same))
    assert found.first_token.equal == sum(row[0] for row in same)
    assert (found.rows, found.left_out) == (5, 1)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masked_models(kind: str) -> None:
    a, b = near(kind)
    rows = [[MASK if place % 3 == 0 else token for place, token in enumerate(row)] for row in ROWS]
    rows.append([7, 8, 9])  # without a mask
    where = [[token == MASK for token in row] for row in rows]
    found = compare_predictions(a, b, rows, mask_id=MASK)
    assert found == compare_predictions(a, b, rows, scored=where)
    equal = counted = 0
    for row in rows:
        for place, (x, y) in enumerate(zip(best(a, row), best(b, row), strict=True)):
            counted += row[place] == MASK
            equal += row[place] == MASK and x == y
    assert found.masked_token is not None
    assert (found.masked_token.equal, found.masked_token.counted) == (equal, counted)
    assert (found.rows, found.left_out) == (len(rows) - 1, 1)


@pytest.mark.parametrize("kind", ["bert classifier", "llama classifier"])
@pytest.mark.parametrize("padding", [0, None])
def test_classifiers(kind: str, padding: int | None) -> None:
    a, b = (make(kind, seed, pad_token_id=padding) for seed in (0, 1))
    rows = ROWS * 4
    found = compare_predictions(a, b, rows)
    equal = sum(best(a, row) == best(b, row) for row in rows)
    assert found.label is not None
    assert (found.label.equal, found.label.counted) == (equal, len(rows))
    assert 0 < equal < len(rows)
    interval = binomtest(equal, len(rows)).proportion_ci(method="wilson")
    assert found.label.interval == pytest.approx((interval.low, interval.high))


def test_labels_in_another_order_are_paired_by_name() -> None:
    a, b = make("bert classifier"), make("bert classifier")
    with torch.no_grad():
        for parameter in (b.classifier.weight, b.classifier.bias):
            parameter.copy_(parameter.flip(0))
    by_number = compare_predictions(a, b, ROWS).label
    a.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    b.config.id2label = {0: "yes", 1: "maybe", 2: "no"}
    by_name = compare_predictions(a, b, ROWS).label
    assert by_number is not None
    assert by_name is not None
    assert by_number.share < by_name.share == 1


@pytest.mark.parametrize("kind", ["llama", "bert", "bert classifier"])
def test_order_and_batches_change_nothing(kind: str) -> None:
    a, b = near(kind)
    found = compare_predictions(a, b, ROWS, mask_id=ROWS[0][0])
    assert found == compare_predictions(b, a, ROWS, mask_id=ROWS[0][0])
    assert found == compare_predictions(a, b, ROWS, mask_id=ROWS[0][0], batch_size=1)
    itself = compare_predictions(a, a, ROWS, mask_id=ROWS[0][0])
    shares = [itself.next_token, itself.first_token, itself.masked_token, itself.label]
    known = [share for share in shares if share is not None]
    assert known
    for share in known:
        assert share.share == 1
        assert share.interval == wilson(1, itself.rows)


@pytest.mark.parametrize("right", [0, 1, 30, 99, 100])
def test_wilsons_interval(right: int) -> None:
    expected = binomtest(right, 100).proportion_ci(method="wilson")
    assert wilson(right / 100, 100) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_interval_holds_where_positions_of_a_row_depend_on_each_other(
    rows: int, spread: float
) -> None:
    random = np.random.default_rng(rows)
    inside, widths = 0, []
    for _ in range(400):
        lengths = random.integers(10, 40, rows)
        centres = 0.6 + spread * random.uniform(-1, 1, rows)
        equal = [
            (random.random(length) < centre).tolist()
            for length, centre in zip(lengths, centres, strict=True)
        ]
        low, high = share_of("next_token", equal).interval
        inside += low <= 0.6 <= high
        widths.append(high - low)
    assert inside / 400 > 0.92
    # Not as wide as if a row were worth one position.
    one_per_row = wilson(0.6, rows)
    assert np.mean(widths) < 0.8 * (one_per_row[1] - one_per_row[0])


REASONS: list[tuple[str, str, Kind | None, str]] = [
    ("llama", "bert", None, "b is a BertForMaskedLM, which does not predict a next token"),
    ("bert", "bert", "classifier", "a is a BertForMaskedLM, which does not predict a label"),
    ("bert", "bert", None, "no row has a masked token"),
    ("t5", "t5", None, "a is an encoder-decoder model, which needs a text for each of its parts"),
]


@pytest.mark.parametrize(("first", "second", "kind", "reason"), REASONS)
def test_reasons(first: str, second: str, kind: Kind | None, reason: str) -> None:
    found = compare_predictions(make(first), make(second), ROWS, kind=kind)
    assert found.reason == reason
    assert found.as_json()["next_token"] is None


def test_reasons_of_classifiers() -> None:
    three = make("bert classifier")
    two = make("bert classifier", num_labels=2)
    one = make("bert classifier", num_labels=1)
    assert compare_predictions(three, two, ROWS).reason == "a has 3 labels, b has 2"
    assert compare_predictions(two, one, ROWS).reason == "b does not choose one label of several"


def test_rows_that_do_not_fit() -> None:
    model = make("llama")
    long = list(range(2, 50)) * 2
    found = compare_predictions(model, model, [*ROWS, long, []])
    assert (found.rows, found.left_out, found.reason) == (len(ROWS), 2, None)
    assert "64 tokens" in (compare_predictions(model, model, [long]).reason or "")
    assert compare_predictions(model, model, []).reason == "there are no rows"
    bare = make("llama").model
    assert kind_of(bare) is None
    assert "LlamaModel" in (compare_predictions(bare, bare, ROWS).reason or "")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    found = compare_predictions(model, model, ROWS)
    assert found.reason == "the outputs of a model are not finite on these rows"


def test_the_shipped_family() -> None:
    names = ("finetuned", "direct")
    found = compare_predictions(member("finetuned"), member("direct"), text_rows()[:8], names=names)
    assert json.loads(json.dumps(found.as_json())) == found.as_json()
    assert found.as_json()["pair"] == list(names)
    assert found.next_token is not None
    assert 0.5 < found.next_token.share < 0.8
    assert "same next token" in found.next_token.what
