"""Scores of models in memory by lm-eval, and the curve of a graft's scores over alpha."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.models.memory import free_memory
from diffxfer.probing.barrier import mean_loss
from diffxfer.probing.losses import row_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.models.source import ModelSource
    from diffxfer.probing.compare_functions import Runtime
    from diffxfer.probing.row_data import ProbeRows

    Score = Callable[[Any, Any, str], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class ScoredPoint:
    """A model on the rows and the tasks: a graft at one alpha, the target, or direct.

    Attributes:
        model: ``"graft"``, ``"target"`` or ``"direct"``.
        alpha: the scale of Δ; None for a model that is no graft.
        loss: the mean loss per scored token, or per row of a classifier, in nats; None without
            rows.
        loss_stderr: its standard error over rows.
        accuracy: the share of scored tokens, or of a classifier's rows, that are predicted right.
        scores: by task and metric.
    """

    model: str
    alpha: float | None
    loss: float | None
    loss_stderr: float | None
    accuracy: float | None
    scores: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def make_score(settings: EvalSettings) -> Score:
    """A function that scores a loaded model, given its tokenizer and its name.

    Args:
        settings: the tasks, and how to ask.

    Raises:
        DiffxferError: if a task is unknown, or its data cannot be loaded.
    """
    from diffxfer.evaluation.harness import score_loaded
    from diffxfer.evaluation.lm_eval_results import read_scores
    from diffxfer.evaluation.lm_eval_tasks import check_task_files, find_tasks

    check_task_files(settings)
    tasks = find_tasks(settings, fingerprint=False)

    def score(model: Any, tokenizer: Any, label: str) -> list[dict[str, Any]]:
        results = score_loaded(model, tokenizer, label, tasks, settings)
        return [
            {
                "task": found.task,
                "metric": found.metric,
                "filter": found.filter,
                "value": found.value if math.isfinite(found.value) else None,
                "stderr": found.stderr,
                "n": found.n,
                "higher_is_better": found.higher_is_better,
            }
            for found in read_scores(results, results["samples"])
        ]

    return score


def score_point(
    source: ModelSource,
    alpha: float | None,
    rows: ProbeRows | None,
    score: Score | None,
    runtime: Runtime,
) -> ScoredPoint:
    """Measure a model on rows, and score it on tasks.

    Args:
        source: the model.
        alpha: the scale of Δ, for a graft.
        rows: the rows; None for no loss.
        score: scores a loaded model; None for no scores.
        runtime: where and how it runs.

    Raises:
        DiffxferError: if it cannot be loaded or scored, or a row cannot be tokenized.
    """
    loaded = runtime.load(source)
    loss: tuple[float | None, float | None] = (None, None)
    accuracy = None
    try:
        if rows is not None:
            found = row_losses(
                loaded.model,
                rows.tokenize(loaded.tokenizer),
                batch_size=runtime.batch_size,
                device=runtime.device,
            )
            loss = mean_loss(found.sums, found.counts)
            accuracy = float(found.right.sum() / found.counts.sum())
        scores = [] if score is None else score(loaded.model, loaded.tokenizer, source.label)
        return ScoredPoint(source.label, alpha, *loss, accuracy, scores)
    finally:
        del loaded
        free_memory()


def best_alpha(points: Sequence[ScoredPoint]) -> float | None:
    """The alpha of the best graft: by its first score, or else by its loss.

    Args:
        points: the scored models.

    Returns:
        The alpha; the one nearer to 1 of equally good ones. None if there is no graft.
    """
    grafts = [point for point in points if point.alpha is not None]
    if not grafts:
        return None

    def rank(point: ScoredPoint) -> tuple[float, float]:
        if point.scores and point.scores[0]["value"] is not None:
            first = point.scores[0]
            value = float(first["value"])
            badness = value if first["higher_is_better"] is False else -value
        else:
            badness = math.inf if point.loss is None else point.loss
        return badness, abs((point.alpha or 0.0) - 1)

    return min(grafts, key=rank).alpha
