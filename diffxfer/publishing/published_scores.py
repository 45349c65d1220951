"""What a model scored, from the folder that `diffxfer eval --output` left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from diffxfer.checkpoints.companions import companion_path, read_bytes
from diffxfer.errors import EvaluationError
from diffxfer.evaluation.score_store import COMPARISON

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Result:
    """A score to publish.

    Attributes:
        task: lm-eval's name of it.
        metric: such as ``"exact_match"``.
        filter: lm-eval's filter, ``"none"`` for none.
        value: the score.
        stderr: its standard error, None where there is none.
        n: of how many questions.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int

    @property
    def label(self) -> str:
        """The metric, with its filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    content: str | None = None
    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    n: int


class _Comparison(BaseModel):
    model_config = ConfigDict(extra="ignore")

    rows: list[_Row]
    columns: list[tuple[str, str, str]]


def read_published_scores(scores: Path, content: str) -> tuple[Result, ...]:
    """The scores of one model, those of the tasks that were asked for.

    Args:
        scores: the folder that `diffxfer eval --output` made.
        content: the model's `evaluation.content_hash.content_hash`.

    Returns:
        One a task, metric and filter, in the order in which they were asked for.

    Raises:
        EvaluationError: if there are no scores, or none of this very model.
        CheckpointError: if they cannot be read.
    """
    again = "score it: diffxfer eval MODEL --tasks TASKS --output DIR"
    path = companion_path(scores, COMPARISON) if scores.is_dir() else None
    if path is None:
        raise EvaluationError(scores, f"has no {COMPARISON}, where scores are due", again)
    try:
        found = _Comparison.model_validate_json(read_bytes(path))
    except ValidationError as exc:
        raise EvaluationError(path, "is not what diffxfer eval writes", again) from exc
    ours = {(row.task, row.metric, row.filter): row for row in found.rows if row.content == content}
    shown = [ours[column] for column in found.columns if column in ours]
    results = tuple(
        Result(row.task, row.metric, row.filter, row.value, row.stderr, row.n)
        for row in shown
        if row.value is not None
    )
    if not results:
        problem = "has no score of this very model, by the content of its files"
        raise EvaluationError(path, problem, again)
    return results
