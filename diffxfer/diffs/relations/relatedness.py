"""Whether models of one shape have anything to do with each other, by sampled elements.

A difference of unrelated models is noise, and so is what it is added to. The cosine of models that
were trained one from the other is 0.8 to 1, tensor by tensor; of models that were trained apart it
is near 0, whatever their shapes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.errors import RelatednessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from diffxfer.diffs.relations.sampling import Sample, Values

_UNRELATED, _DISTANT = 0.1, 0.5
_ENOUGH_SAMPLES = 1000
"""Fewer allow no verdict: a cosine of a few hundred numbers may be anything."""
_ENOUGH_TENSORS = 16
_MAJORITY = 0.75


@dataclass(frozen=True, slots=True)
class Relation:
    """How two models relate.

    Attributes:
        roles: which.
        cosine: of the sampled elements; the median over tensors.
        tensors: how many were sampled.
        samples: how many elements.
        equal: whether they are the same in every one of them.
        layers: the same cosine by layer.
    """

    roles: tuple[str, str]
    cosine: float
    tensors: int
    samples: int
    equal: bool
    layers: Mapping[str, float]


def relate(samples: Sequence[Sample], one: str, other: str) -> Relation | None:
    """Compare two models.

    Args:
        samples: of tensors that both have.
        one: a role.
        other: another one.

    Returns:
        How they relate; None where too little was sampled for a verdict.
    """
    layers: defaultdict[str, list[float]] = defaultdict(list)
    count, equal = 0, True
    for sample in samples:
        left, right = sample.values[one], sample.values[other]
        cosine = _cosine(left, right)
        if cosine is not None:
            layers[sample.layer].append(cosine)
            count += len(left)
            equal = equal and np.array_equal(left, right)
    if count < _ENOUGH_SAMPLES:
        return None
    every = [cosine for found in layers.values() for cosine in found]
    by_layer = {layer: round(median(found), 4) for layer, found in layers.items()}
    return Relation((one, other), round(median(every), 4), len(every), count, equal, by_layer)


def _cosine(left: Values, right: Values) -> float | None:
    """None where it says nothing: a tensor of zeros, as of a layer that is switched off, or NaN."""
    with np.errstate(all="ignore"):
        cosine = float(left @ right / np.sqrt(left @ left) / np.sqrt(right @ right))
    return cosine if np.isfinite(cosine) else None


def refuse_unrelated(relations: Iterable[Relation], verb: str) -> None:
    """Refuse models that have nothing to do with each other.

    Args:
        relations: how they relate.
        verb: the command that would allow it.

    Raises:
        RelatednessError: for the first such pair.
    """
    for relation in relations:
        if relation.cosine < _UNRELATED:
            one, other = relation.roles
            raise RelatednessError(
                relation.roles,
                relation.cosine,
                relation.samples,
                f"{one} and {other} are unrelated: the cosine of {relation.samples:,} sampled"
                f" weights is {relation.cosine:.2f}, and above 0.8 where one is made of the other",
                f"check that {_CHECK[relation.roles]}, or give --allow-unrelated to {verb}",
            )


_CHECK = {
    ("finetuned", "base"): "BASE is the model that FINETUNED was made from",
    ("base", "target"): "TARGET is a successor of the base that FINETUNED was made from",
}


def warn_of_relations(samples: Sequence[Sample], relations: Iterable[Relation]) -> list[str]:
    """Say what looks like a mistake but may be none.

    Args:
        samples: of the roles.
        relations: how they relate.
    """
    warnings = [
        f"{' and '.join(relation.roles)} are only distantly related: the cosine of"
        f" {relation.samples:,} sampled weights is {relation.cosine:.2f}"
        for relation in relations
        if relation.cosine < _DISTANT
    ]
    if not all({"finetuned", "base", "target"} <= sample.values.keys() for sample in samples):
        return warnings
    # Training leads away from where it began: fine-tuning and the successor's own training add up.
    if _are_nearer(samples, "target", "finetuned", than="base"):
        warnings.append(
            "target is nearer to finetuned than to base: are finetuned and base swapped,"
            " or is target a fine-tuned model itself?"
        )
    elif _are_nearer(samples, "finetuned", "target", than="base"):
        warnings.append("finetuned is nearer to target than to base: are base and target swapped?")
    return warnings


def _are_nearer(samples: Sequence[Sample], one: str, other: str, *, than: str) -> bool:
    """Whether a role is nearer to another than to a third one, in most tensors that tell."""
    distances = [
        (_distance(s.values[one], s.values[other]), _distance(s.values[one], s.values[than]))
        for s in samples
    ]
    telling = [near < far for near, far in distances if near != far]
    return len(telling) >= _ENOUGH_TENSORS and sum(telling) >= _MAJORITY * len(telling)


def _distance(left: Values, right: Values) -> float:
    with np.errstate(all="ignore"):
        return float(np.sum(np.square(left - right)))
