"""Chains of rounds: graft a diff vector on each new base, tune, score, and extract the next one."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.hub.repo_ids import shown_name
from diffxfer.checkpoints.output_place import refuse_small_disk, refuse_unsafe_output
from diffxfer.errors import OptionError
from diffxfer.evaluation.score_on_cluster import refuse_gpus_without_cluster
from diffxfer.recycling.chain_checks import check_bases, check_evaluation
from diffxfer.recycling.chain_disk import (
    leftovers,
    model_size,
    peak_disk_bytes,
    peak_disk_bytes_at_once,
    reusable_bytes,
)
from diffxfer.recycling.chain_inputs import ChainInputs, download, open_inputs
from diffxfer.recycling.chain_on_cluster import check_nodes, run_side_by_side
from diffxfer.recycling.chain_plan import Step, StepKind, plan_chain, removable_folders, round_name
from diffxfer.recycling.chain_report import ChainReport, make_report
from diffxfer.recycling.chain_state import ChainState
from diffxfer.recycling.chain_steps import StepContext, run_step
from diffxfer.recycling.input_fingerprints import file_fingerprints, sampled_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.streaming.distribute import Cluster

REPORT_NAME = "report.html"

_STEP_PHRASES = {
    StepKind.MERGE: "merging",
    StepKind.TUNE: "tuning",
    StepKind.EXTRACT: "subtracting",
    StepKind.CHOOSE: "choosing alpha for",
    StepKind.GRAFT: "grafting on",
    StepKind.SCORE: "scoring",
}
_STEP_NAMES = {
    StepKind.MERGE: "merging",
    StepKind.TUNE: "tuning",
    StepKind.EXTRACT: "subtracting",
    StepKind.CHOOSE: "alpha",
    StepKind.GRAFT: "grafting",
    StepKind.SCORE: "scoring",
}


def iterate(
    recipe: Path | str,
    run: Path | str,
    *,
    from_round: int | None = None,
    progress: Callable[[str], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
    training: Callable[[int, int, float], None] | None = None,
    answered: Callable[[str, int, int], None] | None = None,
    stage: Callable[[str], None] | None = None,
    opened: Callable[[Path], None] | None = None,
    cluster: Cluster | None = None,
    gpus_per_model: float | None = None,
) -> ChainReport:
    """Run a recipe: graft on each new base, tune, score, and extract the next diff vector.

    A second call with the same recipe continues after the last finished step; if every step is
    done, it does nothing. See Lin et al. 2025, section 6, and Qin et al. 2023.

    Args:
        recipe: a YAML file.
        run: the folder of rounds, state and report; an existing run is continued.
        from_round: repeat this round and all later ones with the current recipe.
        progress: called with a line about the next work.
        moved: called with the bytes done and the total of a download, an extraction or a graft.
        training: called with the number of training steps done, the total, and the last loss.
        answered: called with the model being scored, its requests answered and the total.
        stage: called when a step begins, with a short text such as ``"round 2/3, tuning"``.
        opened: called with `run` when the folder can be written to.
        cluster: where the steps run, such as `RayCluster`, those that do not wait for each other
            side by side; None for this process, one after the other.
        gpus_per_model: GPUs of each model that is scored or trained on the cluster, as for
            `evaluate`.

    Returns:
        The scores of each round.

    Raises:
        DiffxferError: for every known failure; finished steps are kept.

    Example:
        >>> iterate("chain.yaml", "run")  # doctest: +SKIP
    """
    refuse_gpus_without_cluster(cluster, gpus_per_model)
    began = time.perf_counter()
    recipe, run, tell = Path(recipe), Path(run).absolute(), progress or (lambda _: None)
    inputs = open_inputs(recipe, from_round, tell)
    context = StepContext(
        *(inputs.plan, run, recipe.absolute().parent, tell),
        *(training, moved, answered, stage),
        cluster=cluster,
        gpus_per_model=gpus_per_model,
    )
    refuse_unsafe_output(run / "rounds", [*map(Path, inputs.models), recipe], overwrite=False)
    return _follow(inputs, context, from_round, opened, began)


def _follow(
    inputs: ChainInputs,
    context: StepContext,
    from_round: int | None,
    opened: Callable[[Path], None] | None,
    began: float,
) -> ChainReport:
    """Run the steps that are not done."""
    models, plan, run = inputs.models, inputs.plan, context.run
    steps = plan_chain(plan, run, is_adapter=inputs.is_adapter)
    files = file_fingerprints(plan, context.home, run)
    _refuse_overwritten_inputs([*models, *files], steps)
    download(models, context.tell, context.moved)
    hashes = {path: sampled_fingerprint(checkpoint) for path, checkpoint in models.items()} | files
    with ChainState(run, plan.model_dump(mode="json"), hashes, from_round=from_round) as state:
        pending = _select_pending(steps, state, from_round)
        if pending:
            _check_feasible(pending, steps, context, models)
            state.save()
            if opened is not None:
                opened(run)
            _discard_rounds(steps, from_round)
            (run / REPORT_NAME).unlink(missing_ok=True)
        _run_steps(pending, steps, context, state)
        return _make_report(context, state, len(pending), began)


def _make_report(
    context: StepContext, state: ChainState, steps_done: int, began: float
) -> ChainReport:
    """Make the report, and write its page if anything changed or the page is missing."""
    elapsed_s = time.perf_counter() - began
    report = make_report(context.recipe, context.run, state.done, steps_done, elapsed_s)
    page = context.run / REPORT_NAME
    if steps_done or not page.exists():
        from diffxfer.recycling.chain_page import write_page

        write_page(report, page, home=context.home)
    return report


def _refuse_overwritten_inputs(inputs: Iterable[str], steps: Sequence[Step]) -> None:
    """Refuse an input that a step would overwrite or remove later."""
    made = {Path(os.path.realpath(step.out)) for step in steps if step.out is not None}
    for path in inputs:
        real = Path(os.path.realpath(path))
        if not made.isdisjoint((real, *real.parents)):
            problem = "is an input, and also a folder that this run writes"
            raise OptionError(path, problem, "choose another -o")


def _select_pending(steps: Sequence[Step], state: ChainState, from_round: int | None) -> list[Step]:
    """Select the steps to run, and remove them from the state."""
    if from_round is not None:
        again = [step for step in steps if step.round >= from_round]
        # Steps of an earlier recipe that this one does not have are removed, too.
        planned = {step.key for step in steps}
        state.forget({step.key for step in again} | (state.done.keys() - planned))
    pending = _pending(steps, state.done)
    first = min((step.round for step in pending), default=from_round or 1)
    if from_round is not None and state.mixed_recipes and first < from_round:
        folder = next(step.key for step in pending if step.round == first)
        problem = f"round {from_round} needs {folder}, which is missing, and the recipe changed"
        raise OptionError(
            "--from-round", problem, f"give {first} to repeat every round with the new recipe"
        )
    state.forget({step.key for step in pending})
    return pending


def _check_feasible(
    pending: Sequence[Step],
    steps: Sequence[Step],
    context: StepContext,
    opened: Mapping[str, Checkpoint],
) -> None:
    """Check, before the first step runs, that every step can be completed."""
    check_bases(context.recipe, context.run)
    if any(step.kind in (StepKind.SCORE, StepKind.CHOOSE) for step in pending):
        check_evaluation(context.recipe, context.cluster, context.gpus_per_model)
    sizes = {path: model_size(checkpoint) for path, checkpoint in opened.items()}
    peak = peak_disk_bytes if context.cluster is None else peak_disk_bytes_at_once
    needed = peak(pending, steps, context.recipe, sizes)
    refuse_small_disk(context.run / "rounds", needed, reusable_bytes(pending))
    if context.cluster is not None:
        check_nodes(context, opened)


def _discard_rounds(steps: Sequence[Step], from_round: int | None) -> None:
    """Remove what an interrupted run left of the rounds that are repeated."""
    for step in steps:
        if from_round is not None and step.round >= from_round:
            _discard_leftovers(step)


def _discard_leftovers(step: Step) -> None:
    """Remove what an interrupted run left of a step, so that the step is not resumed."""
    for left in leftovers(step):
        shutil.rmtree(left, ignore_errors=True)


def _pending(steps: Sequence[Step], done: Mapping[str, Any]) -> list[Step]:
    """The steps that are not done, and those whose missing output is needed by one of them."""
    makers = {step.out: step for step in steps if step.out is not None}
    wanted = {step.key for step in steps if step.key not in done}
    waiting = [step for step in steps if step.key in wanted]
    while waiting:
        for path in waiting.pop().inputs:
            maker = makers.get(path)
            if maker is not None and maker.key not in wanted and not path.is_dir():
                wanted.add(maker.key)
                waiting.append(maker)
    return [step for step in steps if step.key in wanted]


def _run_steps(
    pending: Sequence[Step], steps: Sequence[Step], context: StepContext, state: ChainState
) -> None:
    # An earlier run may have been killed before it removed them.
    _remove_unneeded(pending, steps, context)
    made: set[Path | None] = set()

    def begin(index: int, running: Sequence[Step]) -> None:
        step = pending[index]
        what = f"{_STEP_PHRASES[step.kind]} {_describe_inputs(step, context.run)}"
        place = f"step {index + 1} of {len(pending)}"
        context.tell(f"{round_name(step.round)}, {place}: {what}")
        if context.stage is not None:
            names = ", ".join(_STEP_NAMES[each.kind] for each in running)
            context.stage(f"round {step.round}/{len(context.recipe.bases)}, {names}")
        if not made.isdisjoint(step.inputs):
            _discard_leftovers(step)  # it was begun with earlier inputs

    def settle(step: Step, found: Any, later: Sequence[Step]) -> None:
        state.record(step.key, found)
        made.add(step.out)
        _remove_unneeded(later, steps, context)

    if context.cluster is not None:
        run_side_by_side(pending, context, state.done, begin=begin, settle=settle)
        state.order(step.key for step in steps)
        return
    for index, step in enumerate(pending):
        begin(index, [step])
        settle(step, run_step(step, context, state.done), pending[index + 1 :])


def _remove_unneeded(later: Sequence[Step], steps: Sequence[Step], context: StepContext) -> None:
    """Remove the folders that no later step needs and that the recipe does not keep."""
    settled = {step.key for step in steps} - {step.key for step in later}
    for folder in removable_folders(steps, settled, context.recipe.keep):
        shutil.rmtree(folder, ignore_errors=True)


def _describe_inputs(step: Step, run: Path) -> str:
    """The inputs of a step, as text for the user."""

    def short(path: Path) -> str:
        return str(path.relative_to(run)) if path.is_relative_to(run) else shown_name(path)

    names = [short(path) for path in step.inputs]
    if step.kind is StepKind.EXTRACT:
        return " − ".join(names)
    if step.kind is StepKind.MERGE:
        return " into ".join(names)
    if step.kind in (StepKind.GRAFT, StepKind.CHOOSE):
        return names[1]
    if step.kind is StepKind.TUNE and len(names) > 1:
        return f"{names[0]}, taught by {names[1]}"
    return ", ".join(names)
