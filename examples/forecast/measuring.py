"""What is measured of a setting: distances of weights and of activations, and the recovery."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from training import Batch, score

from diffxfer.probing.activations import activation_ratio, linear_ratios

ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5)


def norm(tensors: Sequence[torch.Tensor]) -> float:
    """Return the Euclidean norm of all elements of some tensors."""
    return float(torch.stack([each.double().square().sum() for each in tensors]).sum().sqrt())


def floats(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's parameters, each once."""
    return {name: each.detach() for name, each in model.named_parameters()}


def distances(base: Any, finetuned: Any, target: Any) -> dict[str, float]:
    """Return ‖target − base‖/‖Δ‖ and ‖target − base‖/‖base‖, over all parameters."""
    b, f, t = map(floats, (base, finetuned, target))
    moved = norm([t[name] - b[name] for name in b])
    return {
        "weight_ratio": moved / norm([f[name] - b[name] for name in b]),
        "relative": moved / norm(list(b.values())),
    }


def activations(base: Any, target: Any, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the activation ratio, and what it would be with the head, biases or other means."""
    measured = activation_ratio(base, target, rows)
    with_head, _ = linear_ratios(base, target, rows)
    with_biases, _ = linear_ratios(base.base_model, target.base_model, rows, biases=True)
    ratios = sorted(each.ratio for each in measured.layers)
    return {
        "activation_ratio": measured.mean,
        "with_head": sum(with_head.values()) / len(with_head),
        "with_biases": sum(with_biases.values()) / len(with_biases),
        "median": ratios[len(ratios) // 2],
        "largest": ratios[-1],
    }


def grafted(base: Any, finetuned: Any, target: Any, alpha: float) -> Any:
    """Return target + alpha · (finetuned − base)."""
    graft = deepcopy(target)
    b, f = floats(base), floats(finetuned)
    with torch.no_grad():
        for name, weight in graft.named_parameters():
            weight += alpha * (f[name] - b[name])
    return graft


def graft_scores(
    base: Any, finetuned: Any, target: Any, chosen_on: Batch, graded_on: Batch
) -> dict[str, float]:
    """Return the best of five alphas on some rows, and the score of its graft on others."""
    grafts = {alpha: grafted(base, finetuned, target, alpha) for alpha in ALPHAS}
    chosen = {alpha: score(graft, chosen_on) for alpha, graft in grafts.items()}
    # Of equal ones the one nearest to 1.
    best = max(ALPHAS, key=lambda alpha: (chosen[alpha], -abs(alpha - 1)))
    return {"alpha": best, "graft": score(grafts[best], graded_on)}


def recovery(scores: Mapping[str, float]) -> float:
    """Return the share, in %, of direct fine-tuning's gain that the graft has."""
    return 100 * (scores["graft"] - scores["target"]) / (scores["direct"] - scores["target"])
