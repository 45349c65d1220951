"""Training of encoders against a loop written by hand: loss by loss, then weights and logits.

The loop is plain torch, in its own words: no Trainer, no collator for classifiers, nothing of ours
but the masks, whose own test is in `test_encoders`. See `test_reference_loop` for the tolerances.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

from tests.recycling import encoders
from tests.recycling.encoders import LABELS, RATE

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("trl")

ROWS, STEPS, SEED = 21, 5, 3
W, T, B = 0.6, 3.0, 0.5
"""Weight of distillation, temperature, weight of hidden states."""
# 21 rows in steps of 8: the third step has 5, in batches of 2, 2 and 1 if it is accumulated.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for kind, seed in (("masked", 1), ("bare", 2), ("classifier", 3), ("bert", 4)):
        encoders.save(kind, folder / kind, seed)
    encoders.save("classifier", folder / "taught", 5)
    encoders.save("masked", folder / "guide", 6)
    encoders.labelled(folder / "labels.jsonl", ROWS)
    encoders.labelled(folder / "pairs.jsonl", ROWS, pairs=True)
    encoders.plain(folder / "texts.jsonl", ROWS)
    return folder


def steps_of(size: int) -> list[list[int]]:
    """The rows of each step: each epoch is a permutation, seeded by the seed plus its number."""
    found: list[list[int]] = []
    passed = 0
    while len(found) < STEPS:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(SEED + passed))
        found += [part.tolist() for part in order.split(size)]
        passed += 1
    return found[:STEPS]


def read(home: Path, data: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / data).read_text().splitlines()]


def batch_of(tokenizer: Any, rows: list[dict[str, Any]], kinds: bool) -> dict[str, Tensor]:
    known = [tokenizer(*(row[k] for k in ("text", "text_pair") if k in row)) for row in rows]
    longest = max(len(row["input_ids"]) for row in known)
    blanks = {"input_ids": 1, "attention_mask": 0} | ({"token_type_ids": 0} if kinds else {})
    return {
        key: torch.tensor([row[key] + [blank] * (longest - len(row[key])) for row in known])
        for key, blank in blanks.items()
    }


def soft_terms(logits: Tensor, taught: Tensor) -> Tensor:
    """The divergence of each row of logits from the teacher's."""
    p, q = ((x / T).exp() / (x / T).exp().sum(-1, keepdim=True) for x in (taught, logits))
    return (p * (p / q).log()).sum(-1)


def class_terms(
    student: Any, teacher: Any, batch: dict[str, Tensor], labels: list[int]
) -> dict[str, Tensor]:
    """The means over rows, in float64."""
    out = student(**batch, output_hidden_states=True)
    logits = out.logits.double()
    told = logits - logits.exp().sum(-1, keepdim=True).log()
    found = {"ce": -told[torch.arange(len(labels)), labels].mean()}
    if teacher is not None:
        with torch.no_grad():
            taught = teacher(**batch, output_hidden_states=True)
        found["kl"] = soft_terms(logits, taught.logits.double()).mean()
        rows = []
        for number, real in enumerate(batch["attention_mask"].bool()):
            pairs = zip(out.hidden_states, taught.hidden_states, strict=True)
            apart = [(a[number, real] - b[number, real]).double() ** 2 for a, b in pairs]
            rows.append(torch.stack(apart).mean())
        found["hidden"] = torch.stack(rows).mean()
    return found


def mask_terms(
    student: Any, teacher: Any, batch: dict[str, Tensor], labels: Tensor
) -> dict[str, Tensor]:
    """The means over masked tokens, in float64."""
    row, place = (labels != -100).nonzero().T
    out = student(**batch, output_hidden_states=True)
    logits = out.logits[row, place].double()
    told = logits - logits.exp().sum(-1, keepdim=True).log()
    found = {"ce": -told[torch.arange(len(row)), labels[row, place]].mean()}
    if teacher is not None:
        with torch.no_grad():
            taught = teacher(**batch, output_hidden_states=True)
        found["kl"] = soft_terms(logits, taught.logits[row, place].double()).mean()
        states = [torch.stack(x.hidden_states)[:, row, place].double() for x in (out, taught)]
        found["hidden"] = ((states[0] - states[1]) ** 2).mean()
    return found


def train_by_hand(
    home: Path, model: str, data: str, teacher: str | None, size: int
) -> tuple[list[dict[str, float]], dict[str, Tensor], Any]:
    """The log, first weights and model of a run: decay, a gradient no longer than 1, AdamW."""
    tokenizer = AutoTokenizer.from_pretrained(home / model)
    rows = read(home, data)
    masked = "label" not in rows[0]
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForSequenceClassification
    set_seed(SEED)
    student = kind.from_pretrained(home / model, **({} if masked else {"num_labels": 3})).train()
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    guide = kind.from_pretrained(home / teacher).eval() if teacher else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    log = []
    for step, numbers in enumerate(steps_of(size)):
        batch = batch_of(tokenizer, [rows[n] for n in numbers], kinds=model == "bert")
        if masked:
            ids, labels = masks(tokenizer, batch, numbers, step)
            terms = mask_terms(student, guide, {**batch, "input_ids": ids}, labels)
        else:
            wanted = [LABELS.index(rows[n]["label"]) for n in numbers]
            terms = class_terms(student, guide, batch, wanted)
        loss = terms["ce"]
        if teacher:
            loss = (1 - W) * loss + W * T**2 * terms["kl"] + B * terms["hidden"] / 2
        optimizer.zero_grad()
        loss.backward()
        gradients = [w.grad for w in student.parameters() if w.grad is not None]
        length = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, 1 / float(length)))
        rate = RATE * (STEPS - step) / STEPS
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        shown = {name: term.item() for name, term in terms.items()} if teacher else {}
        log.append(
            {"loss": loss.item(), "grad_norm": length.item(), "learning_rate": rate, **shown}
        )
    return log, before, student


def masks(
    tokenizer: Any, batch: dict[str, Tensor], numbers: list[int], step: int
) -> tuple[Tensor, Tensor]:
    from diffxfer.recycling.encoder_trainer import Masks

    special = (batch["input_ids"] < len(encoders.SPECIALS)).long()
    more = {"special_tokens_mask": special, "row": torch.tensor(numbers)}
    found = Masks(tokenizer, SEED).apply({**batch, **more}, step)
    return found["input_ids"], found["labels"]


def compare(
    home: Path, out: Path, model: str, data: str, *, teacher: str | None = None, parts: int = 1
) -> None:
    size = 8
    options: dict[str, Any] = {"batch_size": size // parts, "gradient_accumulation": parts}
    if teacher:
        options |= {"teacher": home / teacher, "distill_weight": W, "temperature": T}
        options |= {"hidden_weight": B}
    report = encoders.tune_shortly(
        home / model, home / data, out, steps=STEPS, seed=SEED, **options
    )
    expected, before, student = train_by_hand(home, model, data, teacher, size)
    for found, by_hand in zip(report.log, expected, strict=True):
        length = by_hand.pop("grad_norm")
        assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, rel=2e-5, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(length, rel=1e-3)
    assert len({entry["loss"] for entry in report.log}) == STEPS
    after = load_file(out / "model.safetensors")
    weights = {name: w for name, w in student.state_dict().items() if name in after}
    assert weights.keys() == after.keys()
    # Attention does not depend on the bias of keys: AdamW moves it as rounding decides.
    counted = [name for name in weights if not name.endswith("key.bias")]
    apart, moved = (
        sum(float((after[n] - other[n]).double().square().sum()) for n in counted) ** 0.5
        for other in (weights, before)
    )
    assert apart < 1e-3 * moved
    tokenizer = AutoTokenizer.from_pretrained(home / model)
    batch = batch_of(tokenizer, read(home, data)[:4], kinds=model == "bert")
    with torch.no_grad():
        ours = type(student).from_pretrained(out)(**batch).logits
        assert torch.allclose(ours, student.eval()(**batch).logits, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize("teacher", [None, "taught"], ids=["rows", "distilled"])
def test_a_classifier(teacher: str | None, parts: int, home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", "classifier", "labels.jsonl", teacher=teacher, parts=parts)


@pytest.mark.parametrize("model", ["masked", "bare"])
def test_a_new_head(model: str, home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", model, "labels.jsonl")


@pytest.mark.parametrize("model", ["classifier", "bert"])
def test_pairs_of_texts(model: str, home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", model, "pairs.jsonl")


@pytest.mark.parametrize("parts", [1, 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize("teacher", [None, "guide"], ids=["rows", "distilled"])
def test_a_masked_language_model(
    teacher: str | None, parts: int, home: Path, tmp_path: Path
) -> None:
    compare(home, tmp_path / "out", "masked", "texts.jsonl", teacher=teacher, parts=parts)


def test_a_masked_language_model_with_kinds_of_text(home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", "bert", "texts.jsonl")
