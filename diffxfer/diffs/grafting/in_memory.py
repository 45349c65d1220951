"""A graft in memory: tensors, companions and warnings as they would be written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.writer import write_error
from diffxfer.diffs.jobs.damaged_inputs import refuse_damaged
from diffxfer.diffs.jobs.job import companion_bytes, plan_job
from diffxfer.diffs.relations.kinship import warning_of_digests
from diffxfer.streaming.in_memory import TensorMaker
from diffxfer.streaming.measure import measure_inputs
from diffxfer.streaming.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from diffxfer.checkpoints.layout import ShardLayout
    from diffxfer.diffs.grafting.assembly import PlannedGraft
    from diffxfer.diffs.jobs.job import Job
    from diffxfer.streaming.plan import TensorTask


@dataclass(frozen=True, slots=True)
class FileInMemory:
    """A shard of a graft that is not written.

    Attributes:
        name: its name.
        size: its size in bytes.
        parts: gives its bytes, part after part: the header, then each tensor.
    """

    name: str
    size: int
    parts: Callable[[], Iterator[bytes | memoryview]]


class GraftInMemory:
    """A graft whose tensors are computed when they are asked for.

    Everything that a run refuses before it publishes is refused: at the start what headers,
    samples and checks of the inputs show, and with each tensor what its values show.

    Args:
        planned: the graft.
        folder: an empty folder, which receives the companions.

    Attributes:
        warnings: what a user should know, as a run reports it.

    Raises:
        MatchError: if tensors cannot be matched.
        DiffxferError: for every other known failure.
    """

    def __init__(self, planned: PlannedGraft, folder: Path) -> None:
        job, run = planned.job, planned.options.run
        plan, _ = plan_job(job, run)
        fetch_shards([spec.shard for task in plan.tasks for spec in task.inputs], run.progress)
        _check_inputs(planned, plan)
        self.warnings = tuple(job.warnings)
        self._layouts = plan.layouts
        self._tasks = {task.name: task for task in plan.tasks if task.shard is not None}
        _write_companions(job, folder)
        self._maker = TensorMaker(allow_nonfinite=run.allow_nonfinite, threads=run.threads)

    def close(self) -> None:
        """Free what it holds; no tensor can be made any more."""
        self._maker.close()

    def names(self) -> Iterator[str]:
        """The names of the tensors, in the order in which they would be stored."""
        return iter(self._tasks)

    @property
    def files(self) -> tuple[FileInMemory, ...]:
        """The shards that would be written, sorted by name."""
        return tuple(
            FileInMemory(name, layout.size, partial(self._parts, layout))
            for name, layout in self._layouts.items()
        )

    def _parts(self, layout: ShardLayout) -> Iterator[bytes | memoryview]:
        yield layout.header
        for name in layout.starts:
            yield self.make(name).data

    def task(self, name: str) -> TensorTask:
        """The task that makes a tensor."""
        return self._tasks[name]

    def make(self, name: str) -> NDArray[np.uint8]:
        """Compute the bytes of a tensor.

        Args:
            name: one of `names`.

        Raises:
            NonFiniteError: at NaN, infinity or overflow, unless they are allowed.
            ArtifactError: if the diff vector is damaged there.
            CheckpointError: if an input cannot be read, or has changed.
        """
        task = self._tasks[name]
        made, result = self._maker.make(task)
        refuse_damaged(Plan((task,), {}, ()), [result])
        return made


def _check_inputs(planned: PlannedGraft, plan: Plan) -> None:
    """Run the tasks that write nothing, and add the warning that they may give."""
    checks = Plan(tuple(task for task in plan.tasks if task.shard is None), {}, plan.inputs)
    if not checks.tasks:
        return
    results = measure_inputs(checks, threads=planned.options.run.threads)
    refuse_damaged(checks, results)
    if planned.kinship.tasks:
        found = {
            task.name: result.checksum for task, result in zip(checks.tasks, results, strict=True)
        }
        planned.job.warnings.append(warning_of_digests(planned.kinship, found))


def _write_companions(job: Job, folder: Path) -> None:
    for name in job.files:
        path = folder / name
        data = companion_bytes(job, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as exc:
            raise write_error(folder, name, exc) from exc
