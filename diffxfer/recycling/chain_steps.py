"""Running one step of a chain."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.extraction.extract import extract_diff
from diffxfer.diffs.grafting.graft import apply_diff, transfer
from diffxfer.errors import EvaluationError, UnfinishedError
from diffxfer.evaluation.evaluate import evaluate
from diffxfer.recycling.chain_checks import evaluation_options, gpus_for
from diffxfer.recycling.chain_heads import added_head
from diffxfer.recycling.chain_plan import Step, StepKind, round_name
from diffxfer.recycling.training_command import train_by_command
from diffxfer.recycling.training_options import DISTILLATION_DEFAULTS
from diffxfer.recycling.tune import tune

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from diffxfer.recycling.recipe import EvalSection, Recipe, TrainSection
    from diffxfer.streaming.distribute import Cluster


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
        alive: called every second while a training command runs.
        cluster: where models are scored, and diff vectors and grafts are made in parts; None for
            this process.
        gpus_per_model: GPUs of each model that is scored or trained on the cluster.
        train: runs a step that trains somewhere else; None for this process.
    """

    recipe: Recipe
    run: Path
    home: Path
    tell: Callable[[str], None]
    training: Callable[[int, int, float], None] | None
    moved: Callable[[int, int], None] | None
    answered: Callable[[str, int, int], None] | None = None
    stage: Callable[[str], None] | None = None
    alive: Callable[[], None] | None = None
    cluster: Cluster | None = None
    gpus_per_model: float | None = None
    train: Callable[[Step, StepContext], dict[str, Any]] | None = None

    def tell_about_scoring(self, line: str) -> None:
        """Report a line about scoring, with folders relative to the run."""
        self.tell(line.replace(f"{self.run}/", ""))


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
    if step.kind is StepKind.TUNE and context.train is not None:
        return context.train(step, context)
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
        cluster=context.cluster,
    )
    return {"tensors": report.tensors, "warnings": list(report.warnings)}


def _extract(step: Step, context: StepContext, *, restart: bool) -> dict[str, Any]:
    assert step.out is not None
    finetuned, base = step.inputs
    # Only the choice of alpha reads the diff vector of an adapter: the adapter itself is grafted.
    pack = not is_adapter(find(finetuned, "finetuned"))
    report = extract_diff(
        *(finetuned, base, step.out),
        added=added_head(context.recipe, finetuned, base),
        pack=pack,
        restart=restart,
        progress=context.moved,
        cluster=None if pack else context.cluster,  # a packed one is written in order
    )
    if pack:
        share = report.bytes_to_write / max(report.unpacked_bytes or 0, 1)
        size = gigabytes(report.bytes_to_write)
        context.tell(f"the diff vector is exact: {size} packed, {share:.0%} of a rounded one")
    return {
        "inexact": sum(report.inexact.values()),
        "exact": pack,
        "warnings": list(report.warnings),
    }


def _graft(
    step: Step, context: StepContext, done: Mapping[str, Any], *, restart: bool
) -> dict[str, Any]:
    assert step.out is not None
    chosen = done.get(f"{round_name(step.round)}/alpha")
    alpha = chosen["alpha"] if chosen else context.recipe.alphas[0]
    source, base, *adapted = step.inputs
    if adapted:
        report = transfer(
            *(source, adapted[0], base, step.out),
            alpha=alpha,
            added=added_head(context.recipe, source, adapted[0]),
            restart=restart,
            progress=context.moved,
            cluster=context.cluster,
        )
    else:
        _tell_of_rounding(step, context, done)
        report = apply_diff(
            *(source, base, step.out),
            alpha=alpha,
            # The diff vector has an added head only if `added` let it in.
            added=context.recipe.added or "bring",
            restart=restart,
            progress=context.moved,
            cluster=context.cluster,
        )
    return {"alpha": alpha, "tensors": report.tensors, "warnings": list(report.warnings)}


def _tell_of_rounding(step: Step, context: StepContext, done: Mapping[str, Any]) -> None:
    """Tell if an older version of diffxfer made the diff vector of a graft: it is rounded."""
    before = step.round - 1
    key = f"{round_name(before)}/diff"
    if not done[key].get("exact"):
        context.tell(
            f"{key} is rounded: an older version made it; --from-round {before} makes an exact one"
        )


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
            alive=context.alive,
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
        **_where(context, scoring),
        **evaluation_options(scoring, tasks=scoring.tasks[:1]),
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
        **_where(context, scoring),
        **evaluation_options(scoring, tasks=scoring.tasks),
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


def _where(context: StepContext, scoring: EvalSection) -> dict[str, Any]:
    """Where `evaluate` scores the models."""
    if context.cluster is None:
        return {}
    gpus = gpus_for(context.cluster, context.gpus_per_model, scoring.device)
    return {"cluster": context.cluster, "gpus_per_model": gpus}
