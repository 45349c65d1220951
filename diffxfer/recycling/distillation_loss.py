"""The loss for learning from rows and from a teacher, the outdated fine-tuned model, at once.

    L = (1 − w)·CE + w·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) + b·½·MSE(hidden states)

from Qin et al. 2023 (arXiv 2305.08702). All three terms are means over the predicted tokens, or
over the rows of a classifier: the KL divergence is summed over the vocabulary or the labels and
averaged over tokens or rows ("batchmean"), where the paper's code also averages over the logits
("mean"), which divides it by their number. The mean square is also taken over hidden dimensions and
layers, including the output of the embedding; for a classifier also over the tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IGNORED = -100
"""The label of a token that is not predicted."""
TERMS = ("ce", "kl", "hidden")
"""The terms of the loss, as a log names them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of the terms.

    Attributes:
        distill: w, between 0 and 1.
        temperature: T, above 0.
        hidden: b, 0 to ignore the hidden states.
    """

    distill: float
    temperature: float
    hidden: float

    def total(self, terms: Terms) -> Tensor:
        """L, a scalar, from the means or the sums of the terms."""
        total = (1 - self.distill) * terms.ce + self.distill * self.temperature**2 * terms.kl
        return total if terms.hidden is None else total + self.hidden * 0.5 * terms.hidden


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of the loss, summed over the predicted tokens; scalars in float32.

    Attributes:
        ce: the cross entropy with the labels, in nats.
        kl: KL(teacher ‖ student) at the temperature, in nats.
        hidden: the mean square difference of the hidden states; None if it is not used.
    """

    ce: Tensor
    kl: Tensor
    hidden: Tensor | None


class TermSums:
    """The terms of the loss of a step, summed over its batches, for the log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, term: Tensor | None, share: Tensor | float) -> None:
        """Add the term of a batch.

        Args:
            name: one of `TERMS`.
            term: its sum over the predictions of the batch; None if it is not used.
            share: what makes it the batch's share of a mean over the step.
        """
        if term is not None:
            self._sums[name] = self._sums.get(name, 0) + term.detach() * share

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes; the next step begins with none.

        Args:
            accelerator: the Trainer's.
        """
        found = {
            name: float(accelerator.reduce(total, "mean")) for name, total in self._sums.items()
        }
        self._sums.clear()
        return found


def distillation_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Terms:
    """Sum each term over the predicted tokens.

    Args:
        student: logits of shape `(batch, length, vocabulary)`.
        teacher: logits of the same shape.
        labels: shape `(batch, length)`, `IGNORED` for tokens that are not predicted; the logits at
            one position predict the label at the next.
        temperature: the divisor of both logits in the divergence.
        hidden: the student's and the teacher's hidden states, each of shape
            `(batch, length, width)`.

    Returns:
        The sums.
    """
    if hidden is not None:
        hidden = [layer[:, :-1] for layer in hidden[0]], [layer[:, :-1] for layer in hidden[1]]
    return aligned_terms(student[:, :-1], teacher[:, :-1], labels[:, 1:], temperature, hidden)


def aligned_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Terms:
    """Sum each term over the predictions, where logits and labels have the same positions.

    Args:
        student: logits of shape `(*positions, classes)`.
        teacher: logits of the same shape.
        labels: shape `positions`, `IGNORED` where nothing is predicted.
        temperature: the divisor of both logits in the divergence.
        hidden: the student's and the teacher's hidden states, each of shape `(*positions, width)`.

    Returns:
        The sums.
    """
    wanted = labels != IGNORED
    # Only these rows become float32, as the logits of a large vocabulary dominate the memory.
    ours, theirs = student[wanted].float(), teacher[wanted].float()
    ce = functional.cross_entropy(ours, labels[wanted], reduction="sum")
    kl = functional.kl_div(
        functional.log_softmax(ours / temperature, dim=-1),
        functional.log_softmax(theirs / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    if hidden is None:
        return Terms(ce, kl, None)
    layers = [
        (left[wanted].float() - right[wanted].float()).square().mean(-1).sum()
        for left, right in zip(*hidden, strict=True)
    ]
    return Terms(ce, kl, torch.stack(layers).mean())


def row_distances(
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]], attention_mask: Tensor
) -> Tensor:
    """The sum over rows of the mean square difference of their hidden states.

    Args:
        hidden: the student's and the teacher's hidden states, each of shape
            `(batch, length, width)`.
        attention_mask: shape `(batch, length)`, 0 for padding.
    """
    kept = attention_mask.float()
    layers = [
        ((left.float() - right.float()).square().mean(-1) * kept).sum(-1) / kept.sum(-1)
        for left, right in zip(*hidden, strict=True)
    ]
    return torch.stack(layers).mean(0).sum()
