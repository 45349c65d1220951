"""The loss against an independent computation in float64, without the losses of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffxfer.recycling.distillation_loss import IGNORED, Weights, distillation_terms

BATCH, LENGTH, WORDS, WIDTH, LAYERS = 3, 7, 11, 5, 4


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def make(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, WORDS, (BATCH, LENGTH), generator=draw)
    labels[0, :3] = labels[1, 5:] = IGNORED  # a prompt, and padding
    shape, state = (BATCH, LENGTH, WORDS), (LAYERS, BATCH, LENGTH, WIDTH)
    return {
        "student": torch.randn(shape, generator=draw) * 3,
        "teacher": torch.randn(shape, generator=draw) * 3,
        "labels": labels,
        "ours": torch.randn(state, generator=draw),
        "theirs": torch.randn(state, generator=draw),
    }


def oracle(made: dict[str, torch.Tensor], temperature: float) -> tuple[float, float, float]:
    """Each term as a mean over predicted tokens, computed token by token."""
    student, teacher = (made[name].double().numpy() for name in ("student", "teacher"))
    ours, theirs = (made[name].double().numpy() for name in ("ours", "theirs"))
    labels = made["labels"].numpy()
    ce, kl, hidden = [], [], []
    for row in range(BATCH):
        for place in range(LENGTH - 1):
            label = labels[row, place + 1]
            if label == IGNORED:
                continue
            ce.append(-log_softmax(student[row, place])[label])
            p = log_softmax(teacher[row, place] / temperature)
            q = log_softmax(student[row, place] / temperature)
            kl.append((np.exp(p) * (p - q)).sum())
            hidden.append(((ours[:, row, place] - theirs[:, row, place]) ** 2).mean())
    return float(np.mean(ce)), float(np.mean(kl)), float(np.mean(hidden))


@pytest.mark.parametrize("temperature", [1.0, 2.5, 20.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_terms_and_their_sum(seed: int, temperature: float) -> None:
    made = make(seed)
    states = tuple(made["ours"]), tuple(made["theirs"])
    terms = distillation_terms(
        made["student"], made["teacher"], made["labels"], temperature, states
    )
    count = int((made["labels"][:, 1:] != IGNORED).sum())
    ce, kl, hidden = oracle(made, temperature)
    assert terms.hidden is not None
    found = [float(term) / count for term in (terms.ce, terms.kl, terms.hidden)]
    assert found == pytest.approx([ce, kl, hidden], rel=1e-5)
    total = float(Weights(0.7, temperature, 3.0).total(terms)) / count
    expected = 0.3 * ce + 0.7 * temperature**2 * kl + 3.0 * 0.5 * hidden
    assert total == pytest.approx(expected, rel=1e-5)


def test_without_hidden_states() -> None:
    made = make()
    terms = distillation_terms(made["student"], made["teacher"], made["labels"], 2.0)
    assert terms.hidden is None
    assert torch.isfinite(Weights(0.5, 2.0, 0.0).total(terms))


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    made = make()
    student = made["student"].requires_grad_()
    terms = distillation_terms(student, made["student"].detach(), made["labels"], 2.0)
    assert float(terms.kl.detach()) == pytest.approx(0, abs=1e-5)
    (gradient,) = torch.autograd.grad(terms.kl, student)
    assert float(gradient.abs().max()) < 1e-6


def test_nothing_to_predict_is_nothing() -> None:
    made = make()
    student = made["student"].requires_grad_()
    labels = torch.full_like(made["labels"], IGNORED)
    terms = distillation_terms(student, made["teacher"], labels, 1.0)
    assert (float(terms.ce.detach()), float(terms.kl.detach())) == (0, 0)


def test_tokens_that_are_not_predicted_do_not_count() -> None:
    made = make()
    changed = made["student"].clone()
    changed[0, :2] += 5  # they predict tokens of the prompt
    changed[:, -1] -= 5  # they predict what is past the end
    one, other = (
        distillation_terms(logits, made["teacher"], made["labels"], 1.0)
        for logits in (made["student"], changed)
    )
    assert torch.equal(one.ce, other.ce)
    assert torch.equal(one.kl, other.kl)
