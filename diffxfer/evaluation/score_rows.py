"""Rows that compare the scores of several models."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.evaluation.scores import BestAlpha, MetricKey, Row, Score

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffxfer.evaluation.lm_eval_tasks import TaskSet


@dataclass(frozen=True, slots=True)
class ScoredModel:
    """A model with its scores.

    Attributes:
        label: the name of the model as given; for a graft, that of its target.
        alpha: the scale of a graft; None for a model without a graft.
        scores: in the order of the tasks.
        reused: whether some scores were read from the output folder.
        content: the `content_hash` of what was scored, if it is known.
        warnings: what a user should know about the scores, one line each.
    """

    label: str
    alpha: float | None
    scores: tuple[Score, ...]
    reused: bool
    content: str | None = None
    warnings: tuple[str, ...] = ()

    def by_column(self) -> Mapping[MetricKey, Score]:
        """The scores by task, metric and filter."""
        return {score.column: score for score in self.scores}


def compare_models(
    models: Sequence[ScoredModel],
    *,
    target: str,
    baseline: str,
    finetuned: str | None,
    columns: Sequence[MetricKey],
) -> tuple[Row, ...]:
    """Compare every score with that of the baseline.

    Args:
        models: the models that were scored.
        target: the model that the others should improve on.
        baseline: the model to compare with.
        finetuned: the directly fine-tuned target.
        columns: the requested scores; only these get intervals, which take a second each.

    Returns:
        A row for each score, in the order of the models.
    """
    by_label = {model.label: model.by_column() for model in models if model.alpha is None}
    references = _References(by_label, target, baseline, finetuned, frozenset(columns))
    rows = [_row(model, score, references) for model in models for score in model.scores]
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class _References:
    """The models that all others are compared with."""

    by_label: Mapping[str, Mapping[MetricKey, Score]]
    target: str
    baseline: str
    finetuned: str | None
    shown: frozenset[MetricKey]

    def score(self, label: str | None, column: MetricKey) -> Score | None:
        return self.by_label.get(label or "", {}).get(column)


def _row(model: ScoredModel, score: Score, references: _References) -> Row:
    from diffxfer.evaluation.paired_statistics import Recovery, compare_scores, recovered_share

    as_it_is = model.label if model.alpha is None else None
    delta = p_value = None
    recovery = Recovery(None, None, "")
    notes = []
    other = references.score(references.baseline, score.column)
    if other is not None and as_it_is != references.baseline:
        difference = compare_scores(score, other)
        delta, p_value = difference.delta, difference.p_value
        notes.append(difference.note)
    low = references.score(references.target, score.column)
    high = references.score(references.finetuned, score.column)
    if (
        low is not None
        and high is not None
        and as_it_is not in (references.target, references.finetuned)
    ):
        recovery = recovered_share(score, low, high, interval=score.column in references.shown)
        notes.append(recovery.note)
    return Row(
        model=model.label,
        alpha=model.alpha,
        task=score.task,
        metric=score.metric,
        filter=score.filter,
        value=score.value,
        stderr=score.stderr,
        n=score.n,
        higher_is_better=score.higher_is_better,
        baseline=references.baseline,
        delta=delta,
        p_value=p_value,
        recovered=recovery.share,
        recovered_interval=recovery.interval,
        notes=tuple(dict.fromkeys(filter(None, notes))),
        content=model.content,
    )


def requested_columns(tasks: TaskSet, models: Sequence[ScoredModel]) -> tuple[MetricKey, ...]:
    """The scores that the user requested: for a group, its own score, not those of its tasks.

    A group without a score of its own is represented by its tasks.

    Args:
        tasks: the requested tasks.
        models: the models that are scored so far.
    """
    if not models:
        return ()
    columns = list(dict.fromkeys(score.column for model in models for score in model.scores))
    return tuple(
        dict.fromkeys(c for name in tasks.names for c in _columns_of(name, tasks, columns))
    )


def _columns_of(name: str, tasks: TaskSet, columns: Sequence[MetricKey]) -> Iterator[MetricKey]:
    for group in tasks.groups[name]:
        found = [column for column in columns if column[0] == group]
        if found:
            yield from found
            return
    yield from (column for column in columns if column[0] in tasks.leaves[name])


def best_alpha(
    rows: Sequence[Row],
    columns: Sequence[MetricKey],
    diff: str,
    target: str,
    *,
    brings: bool = False,
) -> BestAlpha | None:
    """Find the alpha that scored best on the first task; of equal ones, the smallest in magnitude.

    Args:
        rows: the rows of all models.
        columns: the requested scores, of which the first one decides.
        diff: the diff vector, as given.
        target: the target, as given.
        brings: whether the grafts have a head that the diff vector brings.

    Returns:
        None if fewer than two grafts were scored, or no score is finite.
    """
    decides = columns[:1]
    grafts = [row for row in rows if row.alpha is not None and row.column in decides]
    sound = [row for row in grafts if math.isfinite(row.value)]
    if len(grafts) < 2 or not sound:
        return None
    sign = -1.0 if grafts[0].higher_is_better is False else 1.0
    best = max(sound, key=lambda row: (sign * row.value, -abs(row.alpha or 0.0)))
    alpha = best.alpha or 0.0
    command = ["diffxfer", "apply", diff, target, "-o", "OUT", "--alpha", f"{alpha!r}"]
    command += ["--added", "bring"] if brings else []
    return BestAlpha(alpha, best.task, best.metric, best.value, shlex.join(command))
