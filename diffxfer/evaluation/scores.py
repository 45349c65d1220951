"""What one model scored, and what was found by comparing models: data, without I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

SampleKey: TypeAlias = tuple[str, str, int]
"""A question: hash of the document, hash of its target, and which of several equal ones."""

SampleValue: TypeAlias = float | tuple[float, float]
"""What a sample counts for: a number, or for perplexities a log-likelihood and its weight."""

Samples: TypeAlias = Mapping[SampleKey, SampleValue]

MetricKey: TypeAlias = tuple[str, str, str]
"""What makes scores of several models comparable: task, metric and filter."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """The score of one model on one task by one metric.

    Attributes:
        task: lm-eval's name of the task or group.
        metric: such as ``"exact_match"``.
        filter: lm-eval's filter, such as ``"strict-match"``; ``"none"`` if there is none.
        value: the score, as reported by lm-eval.
        stderr: its standard error; None if lm-eval reports none.
        n: the number of samples.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int

    @property
    def column(self) -> MetricKey:
        """Task, metric and filter."""
        return self.task, self.metric, self.filter

    @property
    def label(self) -> str:
        """The metric, with its filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


@dataclass(frozen=True, slots=True)
class Score(TaskScore):
    """A score with its samples, from which scores of several models are compared.

    Attributes:
        higher_is_better: None if lm-eval does not say.
        samples: the value of each sample; empty if the values are not numbers.
    """

    higher_is_better: bool | None
    samples: Samples


@dataclass(frozen=True, slots=True)
class Row:
    """One score beside the baseline's.

    Attributes:
        model: the model as it was named.
        alpha: for a graft on that model, its scale; None for the model as it is.
        task: see `Score`.
        metric: see `Score`.
        filter: see `Score`.
        value: see `Score`.
        stderr: see `Score`.
        n: see `Score`.
        higher_is_better: see `Score`.
        baseline: the model that it is compared with.
        delta: value − baseline's value; None for the baseline itself.
        p_value: of the paired test that delta is 0; None where there is none.
        recovered: (value − target) / (finetuned − target); None where it means nothing.
        recovered_interval: the 95 % interval of that, by a paired bootstrap.
        notes: why a number is missing or to be taken with care, one line each.
        content: what tells the model from others, by the content of its files, where scores are
            kept; of a graft, of the folder that was made.
    """

    model: str
    alpha: float | None
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    baseline: str
    delta: float | None
    p_value: float | None
    recovered: float | None
    recovered_interval: tuple[float, float] | None
    notes: tuple[str, ...]
    content: str | None = None

    @property
    def column(self) -> MetricKey:
        """Task, metric and filter."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True, slots=True)
class BestAlpha:
    """The scale whose graft scored best on the first task.

    Attributes:
        alpha: the scale.
        task: the task that decided.
        metric: its metric.
        value: what the graft scored.
        command: the `diffxfer apply` line that makes that graft.
    """

    alpha: float
    task: str
    metric: str
    value: float
    command: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What models scored, compared.

    Attributes:
        rows: every score, model by model in the order in which they were named.
        target: the first model, which the others are to improve.
        baseline: the model that the others are compared with.
        finetuned: the directly fine-tuned target, if one was named.
        columns: task, metric and filter of what a person asked for; rows have subtasks too.
        best: the best scale, where several grafts were scored.
        reused: models whose scores were there already, or some of them.
        warnings: one line each.
        output: the folder of the scores, if one was named.
        elapsed_s: seconds from the call to the result.
    """

    rows: tuple[Row, ...]
    target: str
    baseline: str
    finetuned: str | None
    columns: tuple[MetricKey, ...]
    best: BestAlpha | None
    reused: tuple[str, ...]
    warnings: tuple[str, ...]
    output: Path | None
    elapsed_s: float

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        output = None if self.output is None else str(self.output)
        found: dict[str, Any] = _finite({**asdict(self), "output": output})
        return found


def _finite(value: Any) -> Any:
    """The same, with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
