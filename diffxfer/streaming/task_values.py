"""The output of a task as a tensor that can be read in part, and is stored nowhere."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from diffxfer.checkpoints.stored import BITS, StoredTensor
from diffxfer.errors import NonFiniteError
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Chunk, pieces_of
from diffxfer.streaming.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.checkpoints.files import OpenShard
    from diffxfer.checkpoints.stored import Files, ShardFile, TensorSpec
    from diffxfer.streaming.plan import TensorTask

_own = threading.local()
_SMALLER, _CORRECT = "give a smaller --alpha", "correct the checkpoint"


@dataclass(frozen=True, slots=True)
class TaskValues(StoredTensor):
    """What a task computes, in the task's dtype.

    Attributes:
        task: the task.
    """

    task: TensorTask

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The parts of the task's inputs."""
        return tuple(part for stored in self.task.inputs for part in stored.parts)

    @property
    def parameters(self) -> tuple[object, ...]:
        """The operation, its runs, and what the inputs depend on."""
        task = self.task
        runs = tuple((run.kind.value, run.start, run.count, run.rows) for run in task.runs)
        inputs = tuple(stored.parameters for stored in task.inputs)
        return task.operation.value, task.dtype, task.alpha, runs, inputs

    def transposed(self) -> TaskValues | None:
        """The same computation on transposed inputs, if all are stored so."""
        inputs = tuple(
            turned
            for stored in self.task.inputs
            if (turned := stored.transposed()) is not None and stored.shape == self.shape
        )
        if len(self.task.runs) > 1 or len(inputs) < len(self.task.inputs):
            return None
        *matrices, rows, columns = self.shape
        shape = *matrices, columns, rows
        task = replace(self.task, inputs=inputs, shape=shape)
        return TaskValues(self.name, self.dtype, shape, self.shard, task)

    def bytes_to_read(self, count: int) -> int:
        """The bytes read for some of its elements."""
        return sum(stored.bytes_to_read(count) for stored in self.task.inputs)

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Compute elements.

        Raises:
            NonFiniteError: at NaN, infinity or overflow; no option accepts them here.
        """
        size = BITS[self.dtype] // 8
        worker, task = _worker(files), self.task
        run_starts = [run.start * task.row_elements for run in task.runs]
        for done in range(0, len(buffer) // size, BLOCK_ELEMENTS):
            count = min(BLOCK_ELEMENTS, len(buffer) // size - done)
            pieces = pieces_of(task, run_starts, start + done, count)
            try:
                data, _ = worker.process(Chunk(0, 0, start + done, count, pieces), task)
            except NonFiniteError as exc:
                remedy = _SMALLER if exc.role == "output" else _CORRECT
                told = exc.tensor, exc.role, exc.index, exc.problem, remedy
                raise NonFiniteError(*told) from exc
            buffer[done * size : (done + count) * size] = data


def _worker(files: Files) -> Worker:
    """This thread's worker for some files; the last one is kept."""
    known = getattr(_own, "worker", None)
    if known is None or known[0] is not files:
        worker = Worker(
            BLOCK_ELEMENTS,
            allow_nonfinite=False,
            open_shard=cast("Callable[[ShardFile], OpenShard]", files.open),
            shared=files.shared,
        )
        known = _own.worker = files, worker
    found: Worker = known[1]
    return found
