"""Chains of rounds: recycle, tune further, and again as new bases appear."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.writer import refuse_small_disk, refuse_unsafe_output
from diffxfer.diffs.artifact.manifest import refuse_diff
from diffxfer.errors import OptionError
from diffxfer.recycling.chain import Step, Verb, plan_chain, round_name, to_remove
from diffxfer.recycling.chain_report import ChainReport, make_report
from diffxfer.recycling.disk import peak_bytes
from diffxfer.recycling.recipe import PREVIOUS, Recipe, read_recipe
from diffxfer.recycling.state import State
from diffxfer.recycling.steps import Hands, do_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint

REPORT_NAME = "report.html"

_DOING = {
    Verb.TUNE: "tuning",
    Verb.EXTRACT: "subtracting",
    Verb.CHOOSE: "choosing alpha for",
    Verb.GRAFT: "grafting on",
    Verb.SCORE: "scoring",
}


def iterate(
    recipe: Path | str,
    run: Path | str,
    *,
    from_round: int | None = None,
    progress: Callable[[str], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
    training: Callable[[int, int, float], None] | None = None,
) -> ChainReport:
    """Follow a recipe: graft on each new base, tune, score, and take the next diff vector.

    A second call with the same recipe continues after the last finished step, and does nothing
    where all is done. See Lin et al. 2025, section 6, and Qin et al. 2023.

    Args:
        recipe: a YAML file.
        run: the folder of rounds, state and report; it is made, or continued.
        from_round: do this round and all later ones again, by the recipe as it is now.
        progress: called with a line on what is done next.
        moved: called with the bytes done and the bytes in all of an extraction or a graft.
        training: called with the steps done, the steps in all and the last step's loss.

    Returns:
        What each round scored.

    Raises:
        DiffxferError: for every known failure; what is done stays done.

    Example:
        >>> iterate("chain.yaml", "run")  # doctest: +SKIP
    """
    began = time.perf_counter()
    recipe, run = Path(recipe), Path(run).absolute()
    plan = read_recipe(recipe)
    if from_round is not None and not 1 <= from_round <= len(plan.bases):
        problem = f"{from_round} is no round of this recipe"
        raise OptionError("--from-round", problem, f"give 1 to {len(plan.bases)}")
    opened = _open(plan)
    refuse_unsafe_output(run / "rounds", [*map(Path, opened), recipe], overwrite=False)
    steps = plan_chain(plan, run)
    tell = progress or _nobody_listens
    hands = Hands(plan, run, recipe.absolute().parent, tell, training, moved)
    inputs = {path: _identity(checkpoint) for path, checkpoint in opened.items()}
    with State(run, plan.model_dump(mode="json"), inputs, redo=from_round is not None) as state:
        if from_round is not None:
            state.forget({step.key for step in steps if step.round >= from_round})
        pending = _pending(steps, state.done)
        state.forget({step.key for step in pending})
        if pending:
            sizes = {path: _bytes(checkpoint) for path, checkpoint in opened.items()}
            refuse_small_disk(run / "rounds", peak_bytes(pending, steps, plan, sizes))
            state.save()
        _do(pending, steps, hands, state)
        report = make_report(plan, run, state.done, len(pending), time.perf_counter() - began)
        if pending or not (run / REPORT_NAME).exists():
            from diffxfer.recycling.chain_page import write_page

            write_page(report, run / REPORT_NAME)
        return report


def _nobody_listens(line: str) -> None:
    del line


def _open(plan: Recipe) -> dict[str, Checkpoint]:
    """Every model that the recipe names, checked before anything is done."""
    roles = {base: f"base {number}" for number, base in enumerate(plan.bases, 1)}
    if plan.finetuned is not None:
        roles[plan.finetuned] = "finetuned"
    if plan.train is not None and plan.train.teacher not in (None, PREVIOUS):
        roles[str(plan.train.teacher)] = "teacher"
    for path, role in roles.items():
        refuse_diff(Path(path), role)
    return {path: open_checkpoint(Path(path), role) for path, role in roles.items()}


def _identity(checkpoint: Checkpoint) -> str:
    """Tells one state of an input from another by its headers; its dates may change."""
    known = [
        (shard.path.name, shard.size, shard.header_hash) for shard in checkpoint.weights.shards
    ]
    return xxhash.xxh3_128_hexdigest(repr(known).encode())


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(shard.size for shard in checkpoint.weights.shards)


def _pending(steps: Sequence[Step], done: Mapping[str, Any]) -> list[Step]:
    """The steps to do: those that are not done, and those whose folders they need and are gone."""
    makers = {step.out: step for step in steps if step.out is not None}
    wanted = {step.key for step in steps if step.key not in done}
    waiting = [step for step in steps if step.key in wanted]
    while waiting:
        for path in waiting.pop().reads:
            maker = makers.get(path)
            if maker is not None and maker.key not in wanted and not path.is_dir():
                wanted.add(maker.key)
                waiting.append(maker)
    return [step for step in steps if step.key in wanted]


def _do(pending: Sequence[Step], steps: Sequence[Step], hands: Hands, state: State) -> None:
    for number, step in enumerate(pending, 1):
        what = f"{_DOING[step.verb]} {_subject(step, hands.run)}"
        hands.tell(f"{round_name(step.round)}, step {number} of {len(pending)}: {what}")
        state.finish(step.key, do_step(step, hands, state.done))
        later = {other.key for other in pending[number:]}
        settled = {step.key for step in steps} - later
        for folder in to_remove(steps, settled, hands.recipe.keep):
            shutil.rmtree(folder, ignore_errors=True)


def _subject(step: Step, run: Path) -> str:
    """What a step works on, as a person would say it."""

    def short(path: Path) -> str:
        return str(path.relative_to(run)) if path.is_relative_to(run) else path.name

    names = [short(path) for path in step.reads]
    if step.verb is Verb.EXTRACT:
        return " − ".join(names)
    if step.verb in (Verb.GRAFT, Verb.CHOOSE):
        return names[1]
    if step.verb is Verb.TUNE and len(names) > 1:
        return f"{names[0]}, taught by {names[1]}"
    return ", ".join(names)
