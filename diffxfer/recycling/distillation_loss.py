"""The loss for learning from rows and from a teacher, the outdated fine-tuned model, at once.

    L = (1 − w)·CE + w·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) + b·½·MSE(hidden states)

from Qin et al. 2023 (arXiv 2305.08702). All three terms are means over the predicted tokens: the
KL divergence is summed over the vocabulary and averaged over tokens ("batchmean"), where the
paper's code also averages over the logits ("mean"), which divides it by the size of the
vocabulary. The mean square is also taken over hidden dimensions and layers, including the output of
the embedding.
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
"""The label of a token that is not predicted."""


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
    wanted = labels[:, 1:] != IGNORED
    # Only these rows become float32, as the logits of a large vocabulary dominate the memory.
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
