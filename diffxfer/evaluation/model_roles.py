"""The models of an evaluation and their roles: target, baseline, fine-tuned target, grafts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.location import Place
from diffxfer.diffs.delta.from_checkpoints import COMPANIONS
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """A model, or with `diff` and `alpha` a graft on it.

    Attributes:
        label: the model as given.
        diff: the diff vector. Without `alpha`, the model is scored as a graft with alpha 0, which
            has the chat template of finetuned.
        alpha: the scale of the diff vector.
    """

    label: str
    diff: Path | None = None
    alpha: float | None = None

    def __str__(self) -> str:
        return self.label if self.alpha is None else f"{self.label} + {self.alpha!r}·Δ"


@dataclass(frozen=True, slots=True)
class ModelRoles:
    """The models of an evaluation and their roles.

    Attributes:
        models: the models and grafts to score, in the order of the rows, the target first.
        baseline: the label of the model to compare with.
        finetuned: the label of the directly fine-tuned target, if there is one.
        diff: the diff vector of the grafts, if there are any.
        found: the folder of each model that was found, by name.
    """

    models: tuple[ModelUnderTest, ...]
    baseline: str
    finetuned: str | None
    diff: Path | None
    found: Mapping[str, Path] = field(default_factory=dict)

    def folder(self, named: Path | str) -> Path:
        """The folder of a model or the diff vector."""
        return self.found.get(str(named), Path(named))

    @property
    def target(self) -> str:
        """The label of the model that others should improve on."""
        return self.models[0].label

    def labels(self) -> list[str]:
        """The label of every model, without duplicates."""
        return list(dict.fromkeys(model.label for model in self.models))


def assign_roles(
    named: Sequence[Path | str],
    baseline: Path | str | None,
    finetuned: Path | str | None,
    diff: Path | str | None,
    alphas: Sequence[float] | None,
    settings: EvalSettings,
) -> ModelRoles:
    """Assign the roles; two paths of one folder are one model.

    Args:
        named: the models as given.
        baseline: the model to compare with; None for the first one.
        finetuned: the directly fine-tuned target, if there is one.
        diff: a diff vector for grafts on the first model.
        alphas: the scales of the diff vector; None for 1.
        settings: how to score.

    Raises:
        OptionError: if the options do not fit together.
    """
    if not named:
        raise OptionError("MODEL", "no model is given", "give one or more folders")
    known: dict[str, str] = {}
    for label in map(str, named):
        if _identity(label) in known:
            raise OptionError("MODEL", f"{label} is given twice", "give each model once")
        known[_identity(label)] = label
    extra = [
        known.setdefault(_identity(str(one)), str(one)) for one in (baseline, finetuned) if one
    ]
    first, *others = known.values()
    grafts = _grafts(first, diff, alphas, settings)
    return ModelRoles(
        models=(ModelUnderTest(first), *grafts, *map(ModelUnderTest, others)),
        baseline=extra[0] if baseline else first,
        finetuned=extra[-1] if finetuned else None,
        diff=None if diff is None else Path(diff),
    )


def _identity(label: str) -> str:
    """The real path of a folder; any other label as it is."""
    return os.path.realpath(label) if Path(label).is_dir() else label


def _grafts(
    target: str, diff: Path | str | None, alphas: Sequence[float] | None, settings: EvalSettings
) -> list[ModelUnderTest]:
    if diff is None:
        if alphas is not None:
            problem = "scales a diff vector, but none is given"
            raise OptionError("--alpha", problem, "give --diff too")
        return []
    if not settings.reads_folders:
        problem = f"needs a local model, but the backend {settings.backend} asks a server"
        raise OptionError("--diff", problem, "serve the graft, or give --backend hf")
    scales = [1.0] if alphas is None else list(dict.fromkeys(map(float, alphas)))
    if not scales or not all(map(math.isfinite, scales)):
        problem = f"{', '.join(map(str, scales)) or 'nothing'} is not a scale"
        raise OptionError("--alpha", problem, "give one or more numbers, such as 0.8,1.0")
    return [ModelUnderTest(target, Path(diff), scale) for scale in scales]


def supply_chat_templates(
    roles: ModelRoles, settings: EvalSettings, tell: Callable[[str], None]
) -> ModelRoles:
    """Check that every model has a chat template if one is requested.

    A target without a template gets that of finetuned, if the diff vector has one.

    Args:
        roles: the models and their roles.
        settings: how to score.
        tell: called with a line if the target gets a template.

    Returns:
        The roles; the target has the diff vector if it needs its template.

    Raises:
        EvaluationError: if a model has no template and gets none.
    """
    from diffxfer.evaluation.harness import lacks_chat_template, missing_template_error

    if not settings.apply_chat_template:
        return roles
    lend = False
    if roles.diff is not None:
        home = roles.folder(roles.diff)
        companions = home if is_adapter(Place(home)) else home / COMPANIONS
        lend = not lacks_chat_template(companions)
    lacking = [label for label in roles.labels() if lacks_chat_template(roles.folder(label))]
    for label in lacking:
        if label != roles.target or not lend:
            raise missing_template_error(label, has_diff=roles.diff is not None)
    if not lacking:
        return roles
    tell(f"{roles.target} has no chat template: that of {roles.diff} is used")
    first, *others = roles.models
    return replace(roles, models=(replace(first, diff=roles.diff), *others))
