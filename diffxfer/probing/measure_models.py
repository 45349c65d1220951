"""The measurements of a probe that need models in memory, at most two at once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffxfer.errors import EvaluationError
from diffxfer.probing.compare_functions import Runtime, compare_pair, measure_activations
from diffxfer.probing.paths import measure_control, measure_path
from diffxfer.probing.probe_models import PAIRS, PATHS
from diffxfer.probing.scoring import best_alpha, score_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffxfer.probing.compare_functions import FunctionalPair
    from diffxfer.probing.paths import MeasuredPath, SkippedPath
    from diffxfer.probing.probe_inputs import ProbeInputs
    from diffxfer.probing.probe_models import ProbeModels
    from diffxfer.probing.probe_options import ProbeOptions
    from diffxfer.probing.scoring import Score, ScoredPoint

SMALL = 50_000_000
"""Models of fewer parameters run on one thread: on several they are slower, and many times slower
on a busy machine."""


def measure_models(
    models: ProbeModels, options: ProbeOptions, inputs: ProbeInputs, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure models on rows, on tasks, and on text.

    Args:
        models: the models.
        options: what to measure.
        inputs: rows, tasks, and the memory of models.
        tell: called with a line about the next work.

    Returns:
        The parts of the report, by name.

    Raises:
        DiffxferError: if a model cannot be loaded or scored, or a row cannot be tokenized.
    """
    memory = inputs.memory
    tell(memory.sentence(options.device))
    runtime = Runtime(options.device, memory.dtype, options.batch_size, options.seed)
    with _prepared(memory.parameters):
        tell(f"base reads {'a text' if inputs.rows is None else 'the rows'}")
        parts = _activations(models, inputs, runtime)
        if options.measures:
            parts |= _measure(models, options, inputs, runtime, tell)
            notes = _notes(models, inputs, parts["alphas"], ships=parts.pop("ships"))
            parts["notes"] = [*parts["notes"], *notes]
    return parts


@contextmanager
def _prepared(parameters: int) -> Iterator[None]:
    """Silence transformers while it loads, and run small models on one thread."""
    import torch
    from transformers.utils import logging

    untyped: Any = logging
    before = torch.get_num_threads(), untyped.get_verbosity(), untyped.is_progress_bar_enabled()
    untyped.disable_progress_bar()
    untyped.set_verbosity_error()
    if parameters < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        untyped.set_verbosity(before[1])
        if before[2]:
            untyped.enable_progress_bar()


def _activations(models: ProbeModels, inputs: ProbeInputs, runtime: Runtime) -> dict[str, Any]:
    base, target = models.source("base"), models.source("target")
    try:
        found = measure_activations(base, target, inputs.rows, runtime)
    except EvaluationError as exc:
        note = f"The forecast is made of weights alone, since {exc.where} {exc.problem}."
        return {"activations": None, "notes": [note]}
    return {"activations": found, "notes": []}


def _measure(
    models: ProbeModels,
    options: ProbeOptions,
    inputs: ProbeInputs,
    runtime: Runtime,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Scores, comparisons of pairs, and paths; the graft of the last two has the best alpha."""
    alphas = _score_alphas(models, options, inputs, runtime, tell)
    best = best_alpha(alphas)
    assert best is not None, "there is at least one alpha"
    compared: list[FunctionalPair] = []
    for pair in models.pairs(PAIRS):
        tell(f"comparing {pair[0]} with {pair[1]}")
        sources = [models.source(role, best) for role in pair]
        compared.append(compare_pair(sources[0], sources[1], inputs.rows, runtime))
    return {
        "alphas": alphas,
        "graft_alpha": best,
        "attention": [found.attention for found in compared],
        "hidden": [found.hidden for found in compared],
        "agreement": [found.agreement for found in compared if found.agreement] or None,
        "paths": _measure_paths(models, options, inputs, runtime, best, tell),
        "ships": any(found.ships for found in compared),
    }


def _score_alphas(
    models: ProbeModels,
    options: ProbeOptions,
    inputs: ProbeInputs,
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
        found.append(score_point(source, alpha, inputs.rows, inputs.score, runtime))
    return found


def _measure_paths(
    models: ProbeModels,
    options: ProbeOptions,
    inputs: ProbeInputs,
    runtime: Runtime,
    alpha: float,
    tell: Callable[[str], None],
) -> list[MeasuredPath | SkippedPath]:
    """The paths between pairs of models, each followed by its control."""
    rows = inputs.path_rows
    assert rows is not None, "tasks are for models that predict the next token, which read a text"
    found: list[MeasuredPath | SkippedPath] = []
    common: dict[str, Any] = {
        "points": options.points,
        "batch_size": runtime.batch_size,
        "device": runtime.device,
        "dtype": runtime.dtype or "auto",
        "seed": runtime.seed,
    }
    for pair in models.pairs(PATHS):
        tell(f"on the path from {pair[0]} to {pair[1]}")
        a, b = (models.source(role, alpha) for role in pair)
        score = None if inputs.score is None else _named(inputs.score, f"{pair[0]} to {pair[1]}")
        found.append(measure_path(a, b, rows, score=score, **common))
        tell(f"on the path from {pair[0]} to a permuted copy of {pair[1]}")
        found.append(measure_control(a, b, rows, **common))
    return found


def _named(score: Score, label: str) -> Callable[[Any, Any], list[dict[str, Any]]]:
    return lambda model, tokenizer: score(model, tokenizer, label)


def _notes(
    models: ProbeModels, inputs: ProbeInputs, points: Sequence[ScoredPoint], *, ships: bool
) -> Iterator[str]:
    """What was left out, and what a reader must know of the measurements."""
    if "direct" not in models.roles:
        yield (
            "Without --direct, two paths (finetuned to direct, graft to direct) and the share of"
            " direct's gain are left out."
        )
    if inputs.rows is None:
        yield (
            "Without --data, losses along paths are those of a text that ships, and the agreement"
            " of predictions is left out."
        )
    elif ships:
        yield (
            "The rows are short, so attention and hidden states are compared on a text that ships."
        )
    for point in points:
        if inputs.rows is not None and point.loss is None:
            yield f"{point.model} has no loss, since it predicts something else than the rows ask."
    if inputs.score is not None and inputs.memory.dtype is not None:
        yield (
            "Tasks are scored in float32, as by `eval` with --dtype float32 and a diff vector in"
            " float32; by default `eval` computes in the checkpoint's dtype."
        )
