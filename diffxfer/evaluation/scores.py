"""Scores of models and the results of comparing them: data, without I/O.

The module imports the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

SampleKey: TypeAlias = tuple[str, str, int]
"""A sample: the hashes of its document and target, and a number to tell equal samples apart."""

SampleValue: TypeAlias = float | tuple[float, float]
"""The value of a sample: a number, or for perplexities a log-likelihood and its weight."""

Samples: TypeAlias = Mapping[SampleKey, SampleValue]

MetricKey: TypeAlias = tuple[str, str, str]
"""Task, metric and filter: scores of several models are comparable if these are equal."""


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
    """One score, compared with that of the baseline.

    Attributes:
        model: the model as given.
        alpha: the scale of a graft on that model; None for the model without a graft.
        task: see `TaskScore`.
        metric: see `TaskScore`.
        filter: see `TaskScore`.
        value: see `TaskScore`.
        stderr: see `TaskScore`.
        n: see `TaskScore`.
        higher_is_better: see `Score`.
        baseline: the model that it is compared with.
        delta: value − value of the baseline; None for the baseline itself.
        p_value: of the paired test of delta = 0; None if no test is valid.
        recovered: (value − target) / (finetuned − target); None if undefined.
        recovered_interval: its 95 % interval, by a paired bootstrap.
        notes: why a number is missing, one line each.
        content: the hash of the files of the model, or of the temporary folder of a graft; None if
            scores are not stored.
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
    """The alpha whose graft scored best on the first task.

    Attributes:
        alpha: the scale.
        task: the task that decided.
        metric: its metric.
        value: the score of the graft.
        command: the `diffxfer apply` command that writes this graft.
    """

    alpha: float
    task: str
    metric: str
    value: float
    command: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of several models, compared.

    Attributes:
        rows: every score, model by model in the order given.
        target: the first model, which the others should improve on.
        baseline: the model that the others are compared with.
        finetuned: the directly fine-tuned target, if it was given.
        columns: task, metric and filter of the requested scores; rows also have subtasks.
        best: the best alpha, if several grafts were scored.
        reused: the models of which scores were read from the output folder.
        warnings: one line each.
        output: the folder of the scores, if it was given.
        elapsed_s: the duration of the call in seconds.
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
        """The evaluation as JSON values."""
        output = None if self.output is None else str(self.output)
        found: dict[str, Any] = _finite({**asdict(self), "output": output})
        return found


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have, NaN and infinity, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
