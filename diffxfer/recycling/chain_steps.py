"""Running one step of a chain."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.extraction.extract import extract_diff
from diffxfer.diffs.grafting.graft import apply_diff, transfer
from diffxfer.diffs.matching.refusal import refusal
from diffxfer.errors import EvaluationError, MatchError, RelatednessError, UnfinishedError
from diffxfer.evaluation.eval_settings import make_settings
from diffxfer.evaluation.evaluate import evaluate
from diffxfer.recycling.chain_heads import added_head
from diffxfer.recycling.chain_plan import Step, StepKind, round_name
from diffxfer.recycling.training_command import train_by_command
from diffxfer.recycling.training_options import DISTILLATION_DEFAULTS
from diffxfer.recycling.tune import tune

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffxfer.recycling.recipe import EvalSection, Recipe, TrainSection


@dataclass(frozen=True, slots=True)
class StepContext:
    """The recipe, the folders and the callbacks that all steps share.

    Attributes:
        recipe: the recipe.
        run: the folder of the run.
        home: the folder of the recipe.
        tell: called with a line about the current work.
        training: called with the number of training steps done, the total, and the last loss.
        moved: called with the bytes done and the total.
        answered: called with a model, its requests answered and the total.
        stage: called with a short description when a step begins.
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
        """Report a line about scoring, with folders relative to the run."""
        self.tell(line.replace(f"{self.run}/", ""))


def check_evaluation(recipe: Recipe) -> None:
    """Check the eval part of a recipe before hours of training depend on it.

    Args:
        recipe: a recipe with an eval part.

    Raises:
        DiffxferError: if an option is invalid, a task is unknown, or its data cannot be loaded.
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
    """Check, by a dry run of each graft, that the bases are compatible with one another.

    A tuned model has the tensors and tokens of its base, so the base can represent it here.

    Args:
        recipe: the recipe.
        run: the folder of the run.

    Raises:
        DiffxferError: if tensors or tokens do not match, or two models are unrelated.
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
                added=added_head(recipe, Path(finetuned or before), Path(before)),
                dry_run=True,
            )
            if report.refused:
                raise refusal(report.refused)
        except (MatchError, RelatednessError) as exc:
            first = isinstance(exc, RelatednessError) and exc.roles == ("finetuned", "base")
            remedy = exc.remedy or ""
            exc.where = str(finetuned if first else base)
            exc.remedy = "check the bases and finetuned of the recipe"
            if "--added" in remedy:
                exc.remedy += ", or give added: bring in it to carry over what fine-tuning added"
            raise
        finetuned = None


def run_step(step: Step, context: StepContext, done: Mapping[str, Any]) -> Any:
    """Run one step.

    Args:
        step: the step.
        context: the recipe, folders and callbacks.
        done: the results of earlier steps, by key.

    Returns:
        What later steps and the report need to know, as JSON values.

    Raises:
        DiffxferError: if the step fails; then there is nothing at `step.out`.
    """
    if step.out is not None and step.kind is not StepKind.SCORE:
        # Written just before the run was killed and not recorded, or to be written again.
        shutil.rmtree(step.out, ignore_errors=True)
    try:
        return _do(step, context, done, restart=False)
    except UnfinishedError:
        # The state is of another version, or input files have new dates. Only chains write here.
        return _do(step, context, done, restart=True)


def _do(step: Step, context: StepContext, done: Mapping[str, Any], *, restart: bool) -> Any:
    match step.kind:
        case StepKind.MERGE:
            return _merge(step, context, restart=restart)
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


def _merge(step: Step, context: StepContext, *, restart: bool) -> dict[str, Any]:
    assert step.out is not None
    adapter, base = step.inputs
    report = transfer(
        *(adapter, base, base, step.out),
        added=added_head(context.recipe, adapter, base),
        restart=restart,
        progress=context.moved,
    )
    return {"tensors": report.tensors, "warnings": list(report.warnings)}


def _extract(step: Step, context: StepContext, *, restart: bool) -> dict[str, Any]:
    assert step.out is not None
    finetuned, base = step.inputs
    added = added_head(context.recipe, finetuned, base)
    report = extract_diff(
        finetuned, base, step.out, added=added, restart=restart, progress=context.moved
    )
    return {"inexact": sum(report.inexact.values()), "warnings": list(report.warnings)}


def _graft(
    step: Step, context: StepContext, done: Mapping[str, Any], *, restart: bool
) -> dict[str, Any]:
    assert step.out is not None
    chosen = done.get(f"{round_name(step.round)}/alpha")
    alpha = chosen["alpha"] if chosen else context.recipe.alphas[0]
    diff, base = step.inputs
    # The diff vector has an added head only if `added` let it in.
    report = apply_diff(
        *(diff, base, step.out),
        alpha=alpha,
        added=context.recipe.added or "bring",
        restart=restart,
        progress=context.moved,
    )
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
    """The train part as keyword arguments of `tune`; those of distillation need a teacher."""
    given = train.model_dump(exclude={"data", "teacher", "command"})
    for name, default in DISTILLATION_DEFAULTS.items():
        value = given.pop(name)
        if distilled:
            given[name] = default if value is None else value
    return given


def _choose(step: Step, context: StepContext) -> dict[str, Any]:
    """Choose the alpha whose graft scores best on the first task."""
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
        problem = f"yields no score of {base} to choose alpha by"
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
    # Without the base, which may have no head, plain tuning is what the others are compared with.
    first = next((name for name in ("base", "direct") if name in columns), step.columns[0])
    evaluation = evaluate(
        list(dict.fromkeys(columns.values())),
        baseline=columns[first],
        # The recovered share is relative to the gain of direct fine-tuning over the base.
        finetuned=columns.get("direct") if "base" in columns else None,
        output=step.out,
        progress=context.tell_about_scoring,
        moved=context.moved,
        answered=context.answered,
        **_evaluation_options(scoring, tasks=scoring.tasks),
    )
    known = evaluation.as_json()
    # One folder may have two stages: a base that is its own fine-tuned model.
    rows = [
        {**row, "model": column, "baseline": first}
        for column, folder in columns.items()
        for row in known["rows"]
        if row["model"] == str(folder)
    ]
    return {"rows": rows, "columns": known["columns"], "warnings": list(evaluation.warnings)}


def _evaluation_options(scoring: EvalSection, *, tasks: list[str]) -> dict[str, Any]:
    return {**scoring.model_dump(exclude={"tasks"}), "tasks": tasks}
