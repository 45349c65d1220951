"""The heads of the models of an evaluation: those that the backend can use, and their labels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import read_config
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.delta.from_checkpoints import COMPANIONS
from diffxfer.evaluation.head_labels import (
    is_classifier,
    labels_in,
    match_choices,
    refuse_head,
    refuse_without_head,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.evaluation.model_roles import ModelRoles


def supply_heads(
    roles: ModelRoles, settings: EvalSettings, tell: Callable[[str], None]
) -> ModelRoles:
    """Check that every model has a head that the backend can use.

    A target without a classification head gets that of finetuned, if the diff vector brings it.

    Args:
        roles: the models and their roles.
        settings: how to score.
        tell: called with a line if the target gets a head.

    Returns:
        The roles; the target has the diff vector if it needs its head.

    Raises:
        EvaluationError: if the backend runs classifiers and a model is none, or if it runs language
            models and a model is a classifier.
    """
    if not settings.in_process:
        return roles
    configs = {label: read_config(roles.folder(label)) for label in roles.labels()}
    if settings.is_hf:
        for label, config in configs.items():
            refuse_head(label, config, settings.backend)
        return roles
    borrows = not is_classifier(configs[roles.target]) and brought_head(roles) is not None
    for label, config in configs.items():
        if label != roles.target or not borrows:
            refuse_without_head(label, config)
    if not borrows:
        return roles
    tell(f"{roles.target} has no classification head: that of {roles.diff} is used")
    first, *others = roles.models
    return replace(roles, models=(replace(first, diff=roles.diff), *others))


def brought_head(roles: ModelRoles) -> dict[str, Any] | None:
    """The config of a classification head that the diff vector stores whole.

    Args:
        roles: the models and their roles.

    Returns:
        The content of finetuned's config.json; None if the diff vector brings no such head.
    """
    folder = None if roles.diff is None else roles.folder(roles.diff)
    manifest = None if folder is None else read_manifest(folder)
    if folder is None or manifest is None or not manifest.added_tensors:
        return None
    config = read_config(folder / COMPANIONS)
    return config if is_classifier(config) else None


def check_labels(roles: ModelRoles, settings: EvalSettings, tasks: TaskSet) -> None:
    """Check that the choices of each task are the labels of each classifier.

    Only the first question of a task is read; the others are checked when they are answered.

    Args:
        roles: the models, which have heads.
        settings: how to score.
        tasks: the tasks.

    Raises:
        EvaluationError: for the first task and model that do not match.
    """
    if not settings.is_classifier:
        return
    brought = brought_head(roles)
    for model in roles.models:
        config = read_config(roles.folder(model.label))
        if model.diff is not None and brought is not None:
            config = brought
        for task, form in tasks.forms.items():
            match_choices(form.choices, labels_in(config), task=task, model=str(model))
