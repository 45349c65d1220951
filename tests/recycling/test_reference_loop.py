"""The four arms of tune against a training loop written by hand: loss by loss, then the weights.

The loop is plain torch, in its own words: no Trainer, no TRL, nothing of ours. Both have float32
weights and sum in another order, so they agree to some 1e-7 of a value at the first step and 1e-6
at the sixth. A step of AdamW moves an element by its gradient over that gradient's own size: where
a gradient is nearly nothing, rounding decides where it goes. So weights are compared all together,
as the length of their difference, which is 1e-5 to 2e-4 of the length of what training did.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffxfer import transfer
from tests.recycling.training import FAMILY, RATE, tune_shortly, write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("trl")

ROWS, STEPS, SEED = 32, 6, 5
W, T, B = 0.6, 3.0, 0.5
"""Weight of distillation, temperature, weight of hidden states."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and the models in float32, so that rounding of the result hides no difference."""
    folder = tmp_path_factory.mktemp("arms")
    write_rows(folder / "train.jsonl", ROWS)
    for member in ("target", "finetuned", "base"):
        shutil.copytree(FAMILY / member, folder / member)
        weights = load_file(FAMILY / member / "model.safetensors")
        wide = {name: tensor.float() for name, tensor in weights.items()}
        save_file(wide, folder / member / "model.safetensors", {"format": "pt"})
    transfer(folder / "finetuned", folder / "base", folder / "target", folder / "graft")
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def read_questions(home: Path, *, ended: bool) -> list[tuple[list[int], int]]:
    """The tokens of each row, with the end-of-sequence token or without, and the answer's start."""
    tokenizer = AutoTokenizer.from_pretrained(home / "target")
    found = []
    for line in (home / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        found.append(([*whole, *([tokenizer.eos_token_id] if ended else [])], len(asked)))
    return found


def batches_by_seed(count: int, size: int, seed: int) -> list[list[int]]:
    """The rows of each step: each epoch is a permutation, seeded by the seed plus its number."""
    found: list[list[int]] = []
    passed = 0
    while len(found) < STEPS:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + passed))
        found += [part.tolist() for part in order.split(size)]
        passed += 1
    return found[:STEPS]


def terms_of(student: Any, teacher: Any, rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """CE, KL and MSE, each a mean over the tokens of answers in a batch, in float64."""
    longest = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    read = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    places = [(n, i) for n, (ids, start) in enumerate(rows) for i in range(start - 1, len(ids) - 1)]
    row, place = torch.tensor(places).T

    def outputs(model: Any) -> tuple[Tensor, Tensor]:
        out = model(input_ids=padded, attention_mask=read, output_hidden_states=True)
        states = torch.stack(out.hidden_states)[:, row, place]
        return out.logits[row, place].double(), states.double()

    logits, states = outputs(student)
    told = logits - logits.exp().sum(-1, keepdim=True).log()
    found = {"ce": -told[torch.arange(len(row)), padded[row, place + 1]].mean()}
    if teacher is not None:
        with torch.no_grad():
            taught, guide = outputs(teacher)
        p = (taught / T).exp() / (taught / T).exp().sum(-1, keepdim=True)
        q = (logits / T).exp() / (logits / T).exp().sum(-1, keepdim=True)
        found["kl"] = (p * (p / q).log()).sum(-1).mean()
        found["hidden"] = ((states - guide) ** 2).mean()
    return found


def train_by_hand(
    home: Path, model: str, *, taught: bool, size: int, warmup: int, ended: bool
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The log and the weights of a run: warm-up and decay, a gradient no longer than 1, AdamW."""
    student = load(home / model)
    teacher = load(home / "finetuned").eval() if taught else None
    questions = read_questions(home, ended=ended)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    log = []
    for step, numbers in enumerate(batches_by_seed(len(questions), size, SEED)):
        terms = terms_of(student, teacher, [questions[number] for number in numbers])
        loss = terms["ce"]
        if taught:
            soft, same = T**2 * terms["kl"], B * terms["hidden"] / 2
            loss = (1 - W) * terms["ce"] + W * soft + same
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in student.parameters()]
        length = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, 1 / float(length)))
        rising = step < warmup
        rate = RATE * (step / warmup if rising else (STEPS - step) / (STEPS - warmup))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        entry = {"step": step + 1, "loss": loss.item(), "learning_rate": rate}
        shown = {name: term.item() for name, term in terms.items()} if taught else {}
        log.append(entry | {"grad_norm": length.item()} | shown)
    return log, {name: weight.detach() for name, weight in student.named_parameters()}


def compare(
    home: Path,
    out: Path,
    model: str,
    *,
    taught: bool,
    size: int,
    warmup: int = 0,
    ended: bool = True,
) -> None:
    teacher: dict[str, Any] = {
        "teacher": home / "finetuned",
        "distill_weight": W,
        "temperature": T,
        "hidden_weight": B,
    }
    options = {"batch_size": size, "warmup": warmup, "end_token": ended}
    options |= {"steps": STEPS, "seed": SEED, **(teacher if taught else {})}
    tune_shortly(home / model, home / "train.jsonl", out, **options)
    logged = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    expected, weights = train_by_hand(
        home, model, taught=taught, size=size, warmup=warmup, ended=ended
    )
    for found, by_hand in zip(logged, expected, strict=True):
        length = by_hand.pop("grad_norm")
        # A cross entropy near 0 has the rounding of float32 numbers near 1, hence 1e-6.
        wanted = pytest.approx(by_hand, rel=1e-5, abs=1e-6)
        assert {name: found[name] for name in by_hand} == wanted
        assert found["grad_norm"] == pytest.approx(length, rel=1e-3)
    assert ("kl" in logged[0]) == taught
    assert max(entry["grad_norm"] for entry in logged) > 2  # so that its clipping counts
    before, after = (load_file(folder / "model.safetensors") for folder in (home / model, out))
    assert weights.keys() == after.keys()
    apart, moved = (
        sum(float((after[name] - other[name]).double().square().sum()) for name in weights) ** 0.5
        for other in (weights, before)
    )
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("taught", [False, True], ids=["rows", "distilled"])
@pytest.mark.parametrize("model", ["target", "graft"])
def test_each_arm(model: str, taught: bool, home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", model, taught=taught, size=ROWS)


@pytest.mark.parametrize("taught", [False, True], ids=["rows", "distilled"])
def test_batches_smaller_than_the_data(taught: bool, home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", "target", taught=taught, size=12)


def test_warm_up(home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", "graft", taught=False, size=ROWS, warmup=2)


@pytest.mark.parametrize("taught", [False, True], ids=["rows", "distilled"])
def test_without_the_end_token(taught: bool, home: Path, tmp_path: Path) -> None:
    compare(home, tmp_path / "out", "target", taught=taught, size=ROWS, ended=False)
