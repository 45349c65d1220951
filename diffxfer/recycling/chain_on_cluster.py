"""The steps of a chain on a cluster: those that do not wait for each other run side by side.

The driver plans, and keeps the state. A step that trains is one piece of work; one that scores is
a piece a model; one that writes a diff vector or a graft is cut into parts as by its command.
"""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.location import Place
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.cluster.nested import name_cluster_to_programs
from diffxfer.evaluation.score_on_cluster import PROCESS_BYTES, traceback_logged
from diffxfer.recycling.chain_checks import gpus_for
from diffxfer.recycling.chain_plan import ROUNDS_AT_ONCE, Step, StepKind
from diffxfer.recycling.chain_steps import StepContext, run_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import Recipe
    from diffxfer.streaming.distribute import Cluster

_TRAINING_BYTES = 16
"""The memory of training for each parameter: it, its gradient and two moments, in float32."""


class StepStopped(KeyboardInterrupt):
    """A step that is not wanted any longer; what it has done is kept, as after Ctrl-C."""


def check_nodes(context: StepContext, models: Mapping[str, Checkpoint]) -> None:
    """Check that every node sees the folder of the run and the models of the recipe.

    Args:
        context: the folder of the run, and the cluster.
        models: the models of the recipe.

    Raises:
        ClusterError: for the first node that does not.
    """
    assert context.cluster is not None
    shards = [shard for model in models.values() for shard in model.weights.shards]
    with scratch_folder(context.run) as scratch:
        context.cluster.check_folders(scratch, shards)


def run_side_by_side(
    pending: Sequence[Step],
    context: StepContext,
    done: Mapping[str, Any],
    *,
    begin: Callable[[int, Sequence[Step]], None],
    settle: Callable[[Step, Any, Sequence[Step]], None],
) -> None:
    """Run the steps that are not done, each as soon as what it reads is there.

    If one fails, those before it are still run, those after it are stopped.

    Args:
        pending: the steps that are not done, in order.
        context: the recipe, folders, callbacks and the cluster.
        done: the results of earlier steps, by key; `settle` adds to it.
        begin: called before a step begins, with its index and all steps that then run.
        settle: called with a step that has ended, its result and the steps that have not ended.

    Raises:
        DiffxferError: the earliest failure in the order of the steps.
    """
    schedule, lock = _Schedule(pending), threading.Lock()
    running: dict[Future[Any], int] = {}
    failures: dict[int, BaseException] = {}
    with ThreadPoolExecutor(max(len(pending), 1), thread_name_prefix="step") as pool:
        try:
            while True:
                for index in schedule.take_ready():
                    begin(index, [pending[each] for each in sorted((*running.values(), index))])
                    own = _own_context(context, pending[index], schedule.check(index), lock)
                    running[pool.submit(run_step, pending[index], own, done)] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    exc = future.exception()
                    if exc is None:
                        settle(pending[index], future.result(), schedule.end(index))
                    elif not isinstance(exc, StepStopped):
                        failures[index] = exc
                        schedule.stop_after(index)
        except BaseException:
            schedule.stop_after(-1)
            raise
    if failures:
        raise failures[min(failures)]


class _Schedule:
    """Which steps can begin, and which go on.

    Args:
        pending: the steps that are not done, in order.
    """

    def __init__(self, pending: Sequence[Step]) -> None:
        self._steps = pending
        self._before = _dependencies(pending)
        self._queue = list(range(len(pending)))
        self._unfinished = set(self._queue)
        self._last = len(pending)

    def take_ready(self) -> list[int]:
        """The indices of the steps that can begin now; they are taken from the queue."""
        earliest = min((self._steps[each].round for each in self._unfinished), default=0)
        found = [
            index
            for index in self._queue
            if index <= self._last
            and self._steps[index].round < earliest + ROUNDS_AT_ONCE
            and self._before[index].isdisjoint(self._unfinished)
        ]
        self._queue = [index for index in self._queue if index not in found]
        return found

    def end(self, index: int) -> list[Step]:
        """Note that a step has ended; returns those that have not."""
        self._unfinished.discard(index)
        return [self._steps[each] for each in sorted(self._unfinished)]

    def stop_after(self, index: int) -> None:
        """Stop the steps after one; all of them for −1."""
        self._last = min(self._last, index)

    def check(self, index: int) -> Callable[..., None]:
        """A function that raises `StepStopped` once the step is to stop."""

        def check(*_: object) -> None:
            if index > self._last:
                raise StepStopped

        return check


def _dependencies(pending: Sequence[Step]) -> list[set[int]]:
    """For each step, the indices of the steps whose results it needs."""
    return [
        {
            index
            for index, other in enumerate(pending)
            if other.out in step.inputs
            # A graft needs the alpha that is chosen for its round, which leaves no folder.
            or (step.kind, other.kind, other.round) == (StepKind.GRAFT, StepKind.CHOOSE, step.round)
        }
        for step in pending
    ]


def _own_context(
    context: StepContext, step: Step, check: Callable[..., None], lock: threading.Lock
) -> StepContext:
    """The context of one of several steps: its lines name it, and it ends when it is stopped."""
    assert context.cluster is not None

    def tell(line: str) -> None:
        check()
        with lock:
            context.tell(f"{step.key}: {line}")

    return replace(
        context,
        tell=tell,
        moved=check,
        answered=check,
        training=check,
        stage=None,
        train=partial(_train_there, context.cluster, context.gpus_per_model, check),
    )


@dataclass(frozen=True, slots=True)
class _Training:
    """A step that trains, as it is sent to a node."""

    step: Step
    recipe: Recipe
    run: Path
    home: Path


def _train_there(
    cluster: Cluster,
    gpus_per_model: float | None,
    check: Callable[..., None],
    step: Step,
    context: StepContext,
) -> dict[str, Any]:
    """Train a model on a node of the cluster."""
    train = context.recipe.train
    assert train is not None
    gpus = gpus_for(cluster, gpus_per_model, train.device)
    if train.command is None:
        gpus = float(gpus > 0)  # one process, and memory for one model on its GPU
        device = train.device or ("cuda" if gpus else "cpu")
        train = train.model_copy(update={"device": device})
    recipe = context.recipe.model_copy(update={"train": train})
    elements = open_checkpoint(Place(step.inputs[0]), "starting").elements
    running = cluster.run(
        *(train_on_node, [_Training(step, recipe, context.run, context.home)]),
        name=f"diffxfer {step.key}",
        threads=1 if gpus else cluster.threads(None),
        gpus=gpus,
        memory=PROCESS_BYTES + (0 if gpus else _TRAINING_BYTES * elements),
        progress=check,
    )
    with closing(running):
        ((_, found),) = running
    return found


def train_on_node(piece: _Training, report: Callable[[int], None]) -> dict[str, Any]:
    """Run a step that trains.

    Args:
        piece: the step, and what it needs.
        report: called with the number of training steps done.

    Raises:
        DiffxferError: if it fails.
    """
    name_cluster_to_programs()
    context = StepContext(
        recipe=piece.recipe,
        run=piece.run,
        home=piece.home,
        tell=print,  # to the log of the node
        training=lambda done, _total, _loss: report(done),
        moved=None,
        alive=lambda: report(0),
    )
    with traceback_logged():
        found: dict[str, Any] = run_step(piece.step, context, {})
    return found
