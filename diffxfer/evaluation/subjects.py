"""What is scored: models as they are, and grafts on the first of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.diffs.source import COMPANIONS
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.evaluation.settings import Settings


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, or with `diff` and `alpha` a graft on it.

    Attributes:
        label: the model as it was named.
        diff: the diff vector; alone it lends the model finetuned's chat template, as a graft
            with alpha 0 has it.
        alpha: its scale.
    """

    label: str
    diff: Path | None = None
    alpha: float | None = None

    def __str__(self) -> str:
        return self.label if self.alpha is None else f"{self.label} + {self.alpha:g} · {self.diff}"


def make_subjects(
    named: Sequence[Path | str],
    baseline: Path | str | None,
    finetuned: Path | str | None,
    diff: Path | str | None,
    alphas: Sequence[float],
    settings: Settings,
) -> tuple[Subject, ...]:
    """What to score, in the order of the rows: the first model, its grafts, and the others.

    Args:
        named: models, as they were named.
        baseline: one to compare with, None for the first.
        finetuned: the directly fine-tuned target, if there is one.
        diff: a diff vector for grafts on the first model.
        alphas: its scales.
        settings: how they are to be scored.

    Raises:
        OptionError: if these make no sense together.
    """
    if not named:
        raise OptionError("MODEL", "names no model", "give one or more folders")
    labels = list(map(str, named))
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise OptionError("MODEL", f"{twice} is given twice", "give each model once")
    if diff is None and list(alphas) != [1.0]:
        raise OptionError("--alpha", "scales a diff vector, and none is given", "give --diff too")
    if diff is not None and not settings.reads_folders:
        problem = f"makes a folder, and the backend {settings.backend} asks a server"
        raise OptionError("--diff", problem, "serve the graft, or give --backend hf")
    for value in alphas:
        if not math.isfinite(value):
            raise OptionError("--alpha", f"{value} is no scale", "give a finite number")
    grafts = [] if diff is None else list(dict.fromkeys(map(float, alphas)))
    if diff is not None and not grafts:
        raise OptionError("--alpha", "names no scale", "give one or more, such as 0.8,1.0")
    extra = [str(one) for one in (baseline, finetuned) if one is not None]
    others = dict.fromkeys([*labels[1:], *(label for label in extra if label not in labels)])
    return (
        Subject(labels[0]),
        *(Subject(labels[0], Path(str(diff)), value) for value in grafts),
        *map(Subject, others),
    )


def lend_templates(
    subjects: Sequence[Subject], settings: Settings, tell: Callable[[str], None]
) -> Sequence[Subject]:
    """Refuse models without the chat template that is asked for; a target is lent finetuned's.

    Args:
        subjects: what is to be scored, the target first.
        settings: how.
        tell: called with a line on what was lent.

    Returns:
        The subjects, the target with the diff vector where that lends it a template.

    Raises:
        EvaluationError: if another model has none, or there is none to lend.
    """
    from diffxfer.evaluation.harness import lacks_template, no_template

    if not settings.apply_chat_template:
        return subjects
    diff = next((subject.diff for subject in subjects if subject.diff is not None), None)
    lend = diff is not None and not lacks_template(diff / COMPANIONS)
    fitted: list[Subject] = []
    for number, subject in enumerate(subjects):
        if subject.alpha is None and lacks_template(Path(subject.label)):
            if number or not lend:
                raise no_template(subject.label)
            tell(f"{subject} has no chat template: it is asked in that of {diff}")
            subject = replace(subject, diff=diff)
        elif subject.alpha is not None and not lend and lacks_template(Path(subject.label)):
            raise no_template(subject.label)
        fitted.append(subject)
    return fitted
