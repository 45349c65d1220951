"""Whether models of the same shape are related, by the cosine of sampled elements.

The difference of two unrelated models is noise, and adding it to a model ruins the model. If one
model was trained from the other, the cosine of each tensor is 0.8 to 1; if the models were trained
separately, it is near 0, whatever their shapes.
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
"""Fewer samples allow no verdict: the cosine of a few hundred numbers is unreliable."""
_ENOUGH_TENSORS = 16
_MAJORITY = 0.75


@dataclass(frozen=True, slots=True)
class Relation:
    """How two models relate.

    Attributes:
        roles: the two roles.
        cosine: the median over tensors of the cosine of the sampled elements.
        tensors: number of sampled tensors.
        samples: number of sampled elements.
        equal: whether all sampled elements are equal.
        layers: the median cosine by layer.
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
        samples: samples of tensors that both have.
        one: the first role.
        other: the second role.

    Returns:
        How they relate; None if there are too few samples for a verdict.
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
    """The cosine; None if it is undefined, for a tensor of zeros (a disabled layer) or with NaN."""
    with np.errstate(all="ignore"):
        cosine = float(left @ right / np.sqrt(left @ left) / np.sqrt(right @ right))
    return cosine if np.isfinite(cosine) else None


def refuse_unrelated(relations: Iterable[Relation], verb: str) -> None:
    """Refuse unrelated models.

    Args:
        relations: how the models relate.
        verb: the command whose option would allow it.

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
                f" weights is {relation.cosine:.2f}, expected above 0.8 if one was made from the"
                " other",
                f"check that {_CHECK[relation.roles]}, or give --allow-unrelated to {verb}",
            )


_CHECK = {
    ("finetuned", "base"): "BASE is the model that FINETUNED was made from",
    ("base", "target"): "TARGET is a successor of the base that FINETUNED was made from",
}


def warn_of_relations(samples: Sequence[Sample], relations: Iterable[Relation]) -> list[str]:
    """Warn of likely mistakes.

    Args:
        samples: samples of the roles.
        relations: how the roles relate.
    """
    warnings = [
        f"{' and '.join(relation.roles)} are only distantly related: the cosine of"
        f" {relation.samples:,} sampled weights is {relation.cosine:.2f}"
        for relation in relations
        if relation.cosine < _DISTANT
    ]
    if not all({"finetuned", "base", "target"} <= sample.values.keys() for sample in samples):
        return warnings
    # Finetuned and target were both trained from base, independently, so their distance from each
    # other exceeds the distance of either from base.
    if _are_nearer(samples, "target", "finetuned"):
        warnings.append(
            "target is closer to finetuned than to base: are finetuned and base swapped,"
            " or is target a fine-tuned model itself?"
        )
    elif _are_nearer(samples, "finetuned", "target"):
        warnings.append("finetuned is closer to target than to base: are base and target swapped?")
    return warnings


def _are_nearer(samples: Sequence[Sample], one: str, other: str) -> bool:
    """Whether `one` is nearer to `other` than to base in most tensors where these differ."""
    distances = [
        (_distance(s.values[one], s.values[other]), _distance(s.values[one], s.values["base"]))
        for s in samples
    ]
    telling = [near < far for near, far in distances if near != far]
    return len(telling) >= _ENOUGH_TENSORS and sum(telling) >= _MAJORITY * len(telling)


def _distance(left: Values, right: Values) -> float:
    with np.errstate(all="ignore"):
        return float(np.sum(np.square(left - right)))
