"""From the scores of several models to rows that compare them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.evaluation.scores import BestAlpha, Row, Score

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffxfer.evaluation.tasks import TaskSet

Column = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Scored:
    """A model with its scores.

    Attributes:
        label: what a person calls it; of a graft, its target.
        alpha: of a graft, its scale; None for a model as it is.
        scores: in the order of the tasks.
        reused: whether some of them were there already.
    """

    label: str
    alpha: float | None
    scores: tuple[Score, ...]
    reused: bool

    def by_column(self) -> Mapping[Column, Score]:
        """Its scores by task, metric and filter."""
        return {score.column: score for score in self.scores}


def compare_models(
    models: Sequence[Scored], *, target: str, baseline: str, finetuned: str | None
) -> tuple[Row, ...]:
    """Put every score beside the baseline's.

    Args:
        models: the models that were scored, whichever they are.
        target: the model that the others are to improve.
        baseline: the model to compare with.
        finetuned: the directly fine-tuned target.

    Returns:
        A row for each score, in the order of the models.
    """
    by_label = {model.label: model.by_column() for model in models if model.alpha is None}
    rows = [
        _row(model, score, by_label, target, baseline, finetuned)
        for model in models
        for score in model.scores
    ]
    return tuple(rows)


def _row(
    model: Scored,
    score: Score,
    by_label: Mapping[str, Mapping[Column, Score]],
    target: str,
    baseline: str,
    finetuned: str | None,
) -> Row:
    from diffxfer.evaluation.compare import compare_scores, recovered_share

    as_it_is = model.label if model.alpha is None else None
    delta = p_value = recovered = interval = None
    notes = []
    other = by_label.get(baseline, {}).get(score.column)
    if other is not None and as_it_is != baseline:
        difference = compare_scores(score, other)
        delta, p_value = difference.delta, difference.p_value
        notes.append(difference.note)
    low = by_label.get(target, {}).get(score.column)
    high = by_label.get(finetuned or "", {}).get(score.column)
    if low is not None and high is not None and as_it_is not in (target, finetuned):
        recovery = recovered_share(score, low, high)
        recovered, interval = recovery.share, recovery.interval
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
        baseline=baseline,
        delta=delta,
        p_value=p_value,
        recovered=recovered,
        recovered_interval=interval,
        notes=tuple(filter(None, notes)),
    )


def shown_columns(tasks: TaskSet, models: Sequence[Scored]) -> tuple[Column, ...]:
    """The columns that a person asked for: a group's own score where it has one, not its tasks'.

    Args:
        tasks: what was asked for.
        models: what was scored so far.
    """
    if not models:
        return ()
    columns = list(dict.fromkeys(score.column for model in models for score in model.scores))
    return tuple(dict.fromkeys(c for name in tasks.names for c in _of(name, tasks, columns)))


def _of(name: str, tasks: TaskSet, columns: Sequence[Column]) -> Iterator[Column]:
    for group in tasks.groups[name]:
        found = [column for column in columns if column[0] == group]
        if found:
            yield from found
            return
    yield from (column for column in columns if column[0] in tasks.leaves[name])


def best_alpha(
    rows: Sequence[Row], columns: Sequence[Column], diff: str, target: str
) -> BestAlpha | None:
    """The graft that scored best on the first task; of equal ones, that nearest to the target.

    Args:
        rows: of all models.
        columns: the first of them decides.
        diff: the diff vector, as it was named.
        target: the target, as it was named.

    Returns:
        None where fewer than two grafts were scored.
    """
    grafts = [row for row in rows if row.alpha is not None and row.column == columns[0]]
    if len(grafts) < 2:
        return None
    sign = -1.0 if grafts[0].higher_is_better is False else 1.0
    best = max(grafts, key=lambda row: (sign * row.value, -abs(row.alpha or 0.0)))
    alpha = best.alpha or 0.0
    command = ["diffxfer", "apply", diff, target, "-o", "OUT", "--alpha", f"{alpha!r}"]
    return BestAlpha(alpha, best.task, best.metric, best.value, shlex.join(command))
