"""The measurements of a probe that need models in memory, at most two at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.probing.compare_functions import Runtime, compare_pair, measure_activations
from diffxfer.probing.model_memory import plan_memory
from diffxfer.probing.paths import measure_control, measure_path
from diffxfer.probing.probe_models import PAIRS, PATHS
from diffxfer.probing.row_data import read_probe_rows, shipped_rows
from diffxfer.probing.scoring import best_alpha, make_score, score_point

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.probing.paths import MeasuredPath, SkippedPath
    from diffxfer.probing.probe_models import ProbeModels
    from diffxfer.probing.probe_options import ProbeOptions
    from diffxfer.probing.row_data import ProbeRows
    from diffxfer.probing.scoring import Score, ScoredPoint


def measure_models(
    models: ProbeModels, options: ProbeOptions, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure models on rows, on tasks, and on text.

    Args:
        models: the models.
        options: what to measure.
        tell: called with a line about the next work.

    Returns:
        The parts of the report, by name.

    Raises:
        DiffxferError: if models do not fit in memory, or for any other known failure.
    """
    silence_loading()
    loaded = [role for role in models.roles if role != "graft"]
    memory = plan_memory(map(models.source, loaded), options.device)
    tell(memory.sentence(options.device))
    runtime = Runtime(options.device, memory.dtype, options.batch_size, options.seed)
    rows: ProbeRows | None = None
    if options.data is not None:
        rows = read_probe_rows(
            options.data, models.configs(loaded), limit=options.rows, seed=options.seed
        )
    score = None if options.settings is None else make_score(options.settings)
    tell("base reads text")
    base, target = models.source("base"), models.source("target")
    parts: dict[str, Any] = {"activations": measure_activations(base, target, rows, runtime)}
    if not options.measures:
        return parts
    parts["alphas"] = alphas = _score_alphas(models, options, rows, score, runtime, tell)
    best = best_alpha(alphas)
    assert best is not None, "there is at least one alpha"
    compared = []
    for pair in models.pairs(PAIRS):
        tell(f"comparing {pair[0]} with {pair[1]}")
        sources = [models.source(role, best) for role in pair]
        compared.append(compare_pair(sources[0], sources[1], rows, runtime))
    parts["attention"] = [found.attention for found in compared]
    parts["hidden"] = [found.hidden for found in compared]
    parts["agreement"] = [found.agreement for found in compared if found.agreement] or None
    read = rows or shipped_rows(models.configs(loaded), seed=options.seed)
    parts["paths"] = None
    if read is not None:
        parts["paths"] = _measure_paths(models, options, read, score, runtime, best, tell)
    return parts


def silence_loading() -> None:
    """Leave the progress of transformers' loading to the caller's."""
    from transformers.utils import logging

    untyped: Any = logging
    untyped.disable_progress_bar()
    untyped.set_verbosity_error()


def _score_alphas(
    models: ProbeModels,
    options: ProbeOptions,
    rows: ProbeRows | None,
    score: Score | None,
    runtime: Runtime,
    tell: Callable[[str], None],
) -> list[ScoredPoint]:
    """The target, its own fine-tune, and the graft at each alpha."""
    named: list[tuple[str, float | None]] = [("target", None)]
    named += [("direct", None)] if "direct" in models.roles else []
    named += [("graft", alpha) for alpha in options.alphas]
    found = []
    for role, alpha in named:
        tell(f"scoring {role}" + ("" if alpha is None else f" at alpha {alpha:g}"))
        source = models.source(role, 1.0 if alpha is None else alpha)
        found.append(score_point(source, alpha, rows, score, runtime))
    return found


def _measure_paths(
    models: ProbeModels,
    options: ProbeOptions,
    rows: ProbeRows,
    score: Score | None,
    runtime: Runtime,
    alpha: float,
    tell: Callable[[str], None],
) -> list[MeasuredPath | SkippedPath]:
    """The paths between pairs of models, each followed by its control."""
    found: list[MeasuredPath | SkippedPath] = []
    common: dict[str, Any] = {
        "points": options.points,
        "batch_size": runtime.batch_size,
        "device": runtime.device,
        "dtype": runtime.dtype,
        "seed": runtime.seed,
    }
    for pair in models.pairs(PATHS):
        tell(f"on the path from {pair[0]} to {pair[1]}")
        a, b = (models.source(role, alpha) for role in pair)
        scorer = None if score is None else _named(score, f"{pair[0]} to {pair[1]}")
        found.append(measure_path(a, b, rows, score=scorer, **common))
        tell(f"on the path from {pair[0]} to a permuted copy of {pair[1]}")
        found.append(measure_control(a, b, rows, **common))
    return found


def _named(score: Score, label: str) -> Callable[[Any, Any], list[dict[str, Any]]]:
    return lambda model, tokenizer: score(model, tokenizer, label)
