"""The loss that learns from rows and from a teacher, the outdated fine-tuned model, at once.

    L = (1 − w)·CE + w·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) + b·½·MSE(hidden states)

from Qin et al. 2023 (arXiv 2305.08702). All three terms are means over the predicted tokens: the
KL divergence is summed over the vocabulary and averaged over tokens ("batchmean"), where the
paper's code averages over the logits too ("mean"), which makes it smaller by the vocabulary's
size. The mean square is over hidden dimensions and layers as well, the embedding's output included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How the terms are weighed.

    Attributes:
        distill: w, between 0 and 1.
        temperature: T, above 0.
        hidden: b, 0 to leave the hidden states alone.
    """

    distill: float
    temperature: float
    hidden: float

    def total(self, terms: Terms) -> Tensor:
        """L, of the means or the sums of the terms; a scalar."""
        total = (1 - self.distill) * terms.ce + self.distill * self.temperature**2 * terms.kl
        return total if terms.hidden is None else total + self.hidden * 0.5 * terms.hidden


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of the loss, scalars in float32, summed over predicted tokens.

    Attributes:
        ce: cross entropy with the labels, in nats.
        kl: KL(teacher ‖ student) at the temperature, in nats.
        hidden: mean square difference of the hidden states; None where they take no part.
    """

    ce: Tensor
    kl: Tensor
    hidden: Tensor | None


def distillation_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Terms:
    """Sum each term over the tokens that are to be predicted.

    Args:
        student: logits of shape `(batch, length, vocabulary)`.
        teacher: likewise.
        labels: shape `(batch, length)`, `IGNORED` where nothing is predicted; the logits at one
            place predict the label at the next.
        temperature: what both logits are divided by for the divergence.
        hidden: the student's and the teacher's hidden states, each of shape
            `(batch, length, width)`.

    Returns:
        The sums.
    """
    wanted = labels[:, 1:] != IGNORED
    # Only these rows are made float32: the logits of a large vocabulary are most of the memory.
    ours, theirs = student[:, :-1][wanted].float(), teacher[:, :-1][wanted].float()
    ce = functional.cross_entropy(ours, labels[:, 1:][wanted], reduction="sum")
    kl = functional.kl_div(
        functional.log_softmax(ours / temperature, dim=-1),
        functional.log_softmax(theirs / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    if hidden is None:
        return Terms(ce, kl, None)
    layers = [
        (left[:, :-1][wanted].float() - right[:, :-1][wanted].float()).square().mean(-1).sum()
        for left, right in zip(*hidden, strict=True)
    ]
    return Terms(ce, kl, torch.stack(layers).mean())
