"""Checking that tasks ask what classifiers answer, before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import read_config
from diffxfer.errors import EvaluationError
from diffxfer.evaluation.head_labels import labels_in, match_choices, not_multiple_choice
from diffxfer.evaluation.model_roles import brought_head

if TYPE_CHECKING:
    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.evaluation.model_roles import ModelRoles


def check_classifier_tasks(settings: EvalSettings, tasks: TaskSet) -> None:
    """Check that the tasks are multiple choice without examples, if classifiers are scored.

    Args:
        settings: how to score.
        tasks: the tasks.

    Raises:
        EvaluationError: for the first task that a classifier cannot answer.
    """
    if not settings.is_classifier:
        return
    for task, form in tasks.forms.items():
        if form.output_type != "multiple_choice":
            raise not_multiple_choice(task, f"has the output_type {form.output_type}")
        if form.shots:
            problem = (
                f"puts {form.shots} examples before each question, but a classifier reads the"
                " question alone"
            )
            raise EvaluationError(task, problem, "give --num-fewshot 0")


def check_labels(roles: ModelRoles, settings: EvalSettings, tasks: TaskSet) -> None:
    """Check that the choices of each task are the labels of each classifier.

    Only the first question of a task is read; the others are checked when they are answered.

    Args:
        roles: the models, which have heads.
        settings: how to score.
        tasks: the tasks.

    Raises:
        EvaluationError: for the first task and model that do not match, or for a task that a
            classifier cannot answer.
    """
    check_classifier_tasks(settings, tasks)
    if not settings.is_classifier:
        return
    brought = brought_head(roles)
    for model in roles.models:
        config = read_config(roles.folder(model.label))
        if model.diff is not None and brought is not None:
            config = brought
        for task, form in tasks.forms.items():
            match_choices(form.choices, labels_in(config), task=task, model=str(model))
