"""The scores of a model, from the folder that `diffxfer eval --output` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffxfer.checkpoints.companions import companion_path, read_bytes
from diffxfer.errors import EvaluationError
from diffxfer.evaluation.score_store import COMPARISON
from diffxfer.evaluation.scores import TaskScore

if TYPE_CHECKING:
    from pathlib import Path


_SCORES = TypeAdapter(list[TaskScore])


class _Comparison(BaseModel):
    """The fields of `comparison.json` that are read here."""

    model_config = ConfigDict(extra="ignore")

    rows: list[dict[str, Any]]
    columns: list[tuple[str, str, str]]


def read_published_scores(scores: Path, content: str) -> tuple[TaskScore, ...]:
    """Read the scores of one model on the tasks that the user asked for.

    Args:
        scores: the folder that `diffxfer eval --output` wrote.
        content: the `content_hash` of the model.

    Returns:
        One score per task, metric and filter, in the order of the request.

    Raises:
        EvaluationError: if the folder has no scores, or none of this model.
        CheckpointError: if the file cannot be read.
    """
    again = "score it: diffxfer eval MODEL --tasks TASKS --output DIR"
    path = companion_path(scores, COMPARISON) if scores.is_dir() else None
    if path is None:
        raise EvaluationError(scores, f"has no {COMPARISON}, expected a folder of scores", again)
    try:
        comparison = _Comparison.model_validate_json(read_bytes(path))
        # A score that is not a finite number is null in JSON.
        rows = [
            row
            for row in comparison.rows
            if row.get("content") == content and row.get("value") is not None
        ]
        scored = {score.column: score for score in _SCORES.validate_python(rows)}
    except ValidationError as exc:
        raise EvaluationError(path, "is not what diffxfer eval writes", again) from exc
    published = tuple(scored[column] for column in comparison.columns if column in scored)
    if not published:
        problem = "has no score of this model, compared by the content of its files"
        raise EvaluationError(path, problem, again)
    return published
