"""Losses by row: those that transformers computes, whatever the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from diffxfer.probing import losses as module
from diffxfer.probing.losses import row_losses
from diffxfer.probing.rows import TokenRow
from tests.families import randomize
from tests.probing.test_permute import GROUPED, SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

GENERATOR = np.random.default_rng(0)
LENGTHS = (5, 17, 2, 9, 30, 9, 12)


def model(kind: str, config: str, **options: Any) -> Any:
    sizes = {**(SIZES if "Bert" in config or "Roberta" in config else GROUPED), **options}
    made = getattr(transformers, f"AutoModelFor{kind}").from_config(
        getattr(transformers, config)(**sizes)
    )
    randomize(made, 0)
    return made.eval()


def causal_rows() -> list[TokenRow]:
    rows = []
    for length in LENGTHS:
        ids = tuple(GENERATOR.integers(3, 50, length).tolist())
        first = int(GENERATOR.integers(1, length))
        rows.append(TokenRow(ids, tuple(place >= first for place in range(length))))
    return rows


def alone(made: Any, row: TokenRow) -> tuple[float, int]:
    """The loss of a row by transformers, given to the model by itself."""
    ids = torch.tensor([row.ids])
    given: dict[str, Any] = {"input_ids": ids}
    if row.types:
        given["token_type_ids"] = torch.tensor([row.types])
    if row.label is not None:
        given["labels"] = torch.tensor([row.label])
        count = 1
    else:
        wanted = torch.tensor([row.targets or row.ids])
        given["labels"] = torch.where(torch.tensor([row.scored]), wanted, -100)
        count = sum(row.scored)
    with torch.inference_mode():
        return made(**given).loss.item() * count, count


def check(made: Any, rows: Sequence[TokenRow]) -> None:
    one = row_losses(made, rows, batch_size=1)
    for batch_size in (3, 100):
        many = row_losses(made, rows, batch_size=batch_size)
        assert many.sums == pytest.approx(one.sums, rel=1e-6)
        assert (many.counts == one.counts).all()
        assert (many.right == one.right).all()
    expected = [alone(made, row) for row in rows]
    assert one.sums == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert one.counts.tolist() == [count for _, count in expected]
    assert one.sums.dtype == np.float64


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config", "Gemma2Config"])
@pytest.mark.parametrize("padding", [None, 0, 4])
def test_causal_language_models(config: str, padding: int | None) -> None:
    check(model("CausalLM", config, pad_token_id=padding), causal_rows())


def test_a_token_counts_as_right_where_it_has_the_largest_logit() -> None:
    made = model("CausalLM", "LlamaConfig", pad_token_id=0)
    ids = [5]
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(made(torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = TokenRow(tuple(ids), (False, *(True,) * 6))
    other = TokenRow((*ids[:-1], (ids[-1] + 1) % 50), (False, *(True,) * 6))
    assert row_losses(made, [greedy, other]).right.tolist() == [6, 5]


@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig"])
def test_masked_language_models(config: str) -> None:
    made = model("MaskedLM", config, pad_token_id=1 if config == "RobertaConfig" else 0)
    rows = []
    for row in causal_rows():
        given = tuple(2 if due else i for i, due in zip(row.ids, row.scored, strict=True))
        rows.append(TokenRow(given, row.scored, targets=row.ids))
    check(made, rows)


def labelled(*, pairs: bool) -> list[TokenRow]:
    rows = []
    for number, row in enumerate(causal_rows()):
        types = tuple(map(int, row.scored)) if pairs and number % 2 else None
        label = int(GENERATOR.integers(0, 3))
        rows.append(TokenRow(row.ids, (False,) * len(row.ids), label, types=types))
    return rows


@pytest.mark.parametrize("pairs", [False, True])
def test_classifiers(pairs: bool) -> None:
    made = model("SequenceClassification", "BertConfig", num_labels=3)
    rows = labelled(pairs=pairs)
    check(made, rows)
    with torch.inference_mode():
        types = [torch.tensor([row.types]) if row.types else None for row in rows]
        said = [
            int(made(torch.tensor([row.ids]), token_type_ids=segments).logits.argmax())
            for row, segments in zip(rows, types, strict=True)
        ]
    hits = [int(label == row.label) for label, row in zip(said, rows, strict=True)]
    assert row_losses(made, rows).right.tolist() == hits


@pytest.mark.parametrize("padding", [None, 0])
def test_classifiers_that_are_decoders(padding: int | None) -> None:
    made = model("SequenceClassification", "LlamaConfig", num_labels=3, pad_token_id=padding)
    check(made, labelled(pairs=False))


def test_logits_are_made_exact_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = model("CausalLM", "LlamaConfig", pad_token_id=0), causal_rows()
    whole = row_losses(made, rows)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 150)
    assert (row_losses(made, rows).sums == whole.sums).all()
