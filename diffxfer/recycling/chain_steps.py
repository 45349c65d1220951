"""Doing one step of a chain."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.extract import extract_diff
from diffxfer.diffs.graft import apply_diff, transfer
from diffxfer.diffs.matching.refusal import refusal
from diffxfer.errors import EvaluationError, MatchError, RelatednessError, UnfinishedError
from diffxfer.evaluation.eval_settings import make_settings
from diffxfer.evaluation.evaluate import evaluate
from diffxfer.recycling.chain_plan import Step, StepKind, round_name
from diffxfer.recycling.training_command import train_by_command
from diffxfer.recycling.training_options import DISTILLATION_DEFAULTS
from diffxfer.recycling.tune import tune

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffxfer.recycling.recipe import EvalSection, Recipe, TrainSection


@dataclass(frozen=True, slots=True)
class StepContext:
    """What steps have in common.

    Attributes:
        recipe: what to do.
        run: the folder of the run.
        home: the folder of the recipe.
        tell: called with a line on what is done.
        training: called with the steps done, the steps in all and the last step's loss.
        moved: called with the bytes done and the bytes in all.
        answered: called with a model, its requests answered and its requests in all.
        stage: called with a few words on each step.
    """

    recipe: Recipe
    run: Path
    home: Path
    tell: Callable[[str], None]
    training: Callable[[int, int, float], None] | None
    moved: Callable[[int, int], None] | None
    answered: Callable[[str, int, int], None] | None = None
    stage: Callable[[str], None] | None = None

    def tell_about_scoring(self, line: str) -> None:
        """A line on scoring, with the folders of the run as it has them."""
        self.tell(line.replace(f"{self.run}/", ""))


def check_evaluation(recipe: Recipe) -> None:
    """Find the tasks and what runs the models, so that a slip is not met after hours of training.

    Args:
        recipe: what to do.

    Raises:
        DiffxferError: if a task is unknown or its data cannot be had, or an option is wrong.
    """
    from diffxfer.evaluation.harness import check_backend, check_device
    from diffxfer.evaluation.lm_eval_tasks import check_task_files, find_tasks

    assert recipe.eval is not None
    given = _evaluation_options(recipe.eval, tasks=recipe.eval.tasks)
    folder = given.pop("include_path")
    settings = make_settings(include_path=None if folder is None else Path(folder), **given)
    check_task_files(settings)
    check_backend(settings)
    check_device(settings)
    find_tasks(settings, fingerprint=False)


def check_bases(recipe: Recipe, run: Path) -> None:
    """See that every base takes what was made from the one before, without hours of training.

    A model that is tuned has its base's tensors and tokens, so that the base stands for it.

    Args:
        recipe: what to do.
        run: the folder of the run.

    Raises:
        DiffxferError: if tensors or tokens do not fit, or two models are unrelated.
    """
    finetuned = recipe.finetuned
    for before, base in pairwise(recipe.bases):
        try:
            report = transfer(
                finetuned or before,
                before,
                base,
                run / "rounds",
                alpha=max(recipe.alphas, key=abs),
                dry_run=True,
            )
            if report.refused:
                raise refusal(report.refused)
        except (MatchError, RelatednessError) as exc:
            first = isinstance(exc, RelatednessError) and exc.roles == ("finetuned", "base")
            exc.where = str(finetuned if first else base)
            exc.remedy = "check the bases and finetuned of the recipe"
            raise
        finetuned = None


def run_step(step: Step, context: StepContext, done: Mapping[str, Any]) -> Any:
    """Do one step.

    Args:
        step: which.
        context: what to do it with.
        done: what earlier steps found, by their keys.

    Returns:
        What later steps or the report need of it, as values that JSON has.

    Raises:
        DiffxferError: if it cannot be done; nothing is at `step.out` then.
    """
    if step.out is not None and step.kind is not StepKind.SCORE:
        # Made just before a kill, and not noted; or made before, and to be made again.
        shutil.rmtree(step.out, ignore_errors=True)
    try:
        return _do(step, context, done, restart=False)
    except UnfinishedError:
        # Begun by another version, or with files of other dates: nobody else works in this folder.
        return _do(step, context, done, restart=True)


def _do(step: Step, context: StepContext, done: Mapping[str, Any], *, restart: bool) -> Any:
    match step.kind:
        case StepKind.TUNE:
            return _tune(step, context, restart=restart)
        case StepKind.EXTRACT:
            return _extract(step, context, restart=restart)
        case StepKind.CHOOSE:
            return _choose(step, context)
        case StepKind.GRAFT:
            return _graft(step, context, done, restart=restart)
        case StepKind.SCORE:
            return _score(step, context)


def _extract(step: Step, context: StepContext, *, restart: bool) -> dict[str, Any]:
    assert step.out is not None
    finetuned, base = step.inputs
    report = extract_diff(finetuned, base, step.out, restart=restart, progress=context.moved)
    return {"inexact": sum(report.inexact.values()), "warnings": list(report.warnings)}


def _graft(
    step: Step, context: StepContext, done: Mapping[str, Any], *, restart: bool
) -> dict[str, Any]:
    assert step.out is not None
    chosen = done.get(f"{round_name(step.round)}/alpha")
    alpha = chosen["alpha"] if chosen else context.recipe.alphas[0]
    diff, base = step.inputs
    report = apply_diff(diff, base, step.out, alpha=alpha, restart=restart, progress=context.moved)
    return {"alpha": alpha, "tensors": report.tensors, "warnings": list(report.warnings)}


def _tune(step: Step, context: StepContext, *, restart: bool) -> dict[str, Any]:
    train, out = context.recipe.train, step.out
    assert train is not None
    assert out is not None
    model, *teachers = step.inputs
    teacher = teachers[0] if teachers else None
    if train.command is not None:
        train_by_command(
            *(train.command, model, out),
            number=step.round,
            teacher=teacher,
            home=context.home,
            tell=context.tell,
        )
        return {"log": []}
    report = tune(
        model,
        str(train.data),
        out,
        teacher=teacher,
        restart=restart,
        progress=context.training,
        **_tune_options(train, distilled=teacher is not None),
    )
    log = [{name: entry[name] for name in ("step", "loss")} for entry in report.log]
    return {"log": log, "warnings": list(report.warnings)}


def _tune_options(train: TrainSection, *, distilled: bool) -> dict[str, Any]:
    """The recipe's part as `tune` takes it; without a teacher, nothing of distillation."""
    given = train.model_dump(exclude={"data", "teacher", "command"})
    for name, default in DISTILLATION_DEFAULTS.items():
        value = given.pop(name)
        if distilled:
            given[name] = default if value is None else value
    return given


def _choose(step: Step, context: StepContext) -> dict[str, Any]:
    """The alpha whose graft scores best on the first task."""
    scoring = context.recipe.eval
    assert scoring is not None
    diff, base = step.inputs
    evaluation = evaluate(
        base,
        diff=diff,
        alpha=context.recipe.alphas,
        output=context.run / round_name(step.round) / "scores",
        progress=context.tell_about_scoring,
        moved=context.moved,
        answered=context.answered,
        **_evaluation_options(scoring, tasks=scoring.tasks[:1]),
    )
    if evaluation.best is None:
        problem = f"gives {base} no score to choose alpha by"
        raise EvaluationError(
            scoring.tasks[0], problem, "put another task first, or give one alpha"
        )
    values = {
        repr(row.alpha): row.value
        for row in evaluation.rows
        if row.alpha is not None and row.column == evaluation.columns[0]
    }
    listed = ", ".join(f"{alpha} scores {value:.4f}" for alpha, value in values.items())
    context.tell(f"alpha {evaluation.best.alpha!r} is best on {evaluation.best.task}: {listed}")
    return {"alpha": evaluation.best.alpha, "values": values}


def _score(step: Step, context: StepContext) -> dict[str, Any]:
    scoring = context.recipe.eval
    assert scoring is not None
    columns = dict(zip(step.columns, step.inputs, strict=True))
    evaluation = evaluate(
        list(dict.fromkeys(columns.values())),
        # What is recovered is a share of what direct tuning gains over the base.
        finetuned=columns.get("direct") if "base" in columns else None,
        output=step.out,
        progress=context.tell_about_scoring,
        moved=context.moved,
        answered=context.answered,
        **_evaluation_options(scoring, tasks=scoring.tasks),
    )
    known = evaluation.as_json()
    first = step.columns[0]
    # One folder may be two columns: a base that is its own fine-tuned model.
    rows = [
        {**row, "model": column, "baseline": first}
        for column, folder in columns.items()
        for row in known["rows"]
        if row["model"] == str(folder)
    ]
    return {"rows": rows, "columns": known["columns"], "warnings": list(evaluation.warnings)}


def _evaluation_options(scoring: EvalSection, *, tasks: list[str]) -> dict[str, Any]:
    return {**scoring.model_dump(exclude={"tasks"}), "tasks": tasks}
