"""Reading Δ of one tensor: as a matrix in float32, or only its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffxfer.checkpoints.stored import BITS
from diffxfer.diffs.delta.difference_rows import stored_delta
from diffxfer.errors import NonFiniteError
from diffxfer.kernels.native import kernel
from diffxfer.kernels.signatures import SCRATCH, TOTALS
from diffxfer.streaming.plan import BLOCK_ELEMENTS, RunKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.checkpoints.stored import Files, StoredTensor
    from diffxfer.diffs.lora.factorise import Matrix
    from diffxfer.diffs.lora.parts import Part

_INPUTS = 10, 11
"""Memory of `Files` that no encoding uses."""
_ALLOW = "mend the checkpoint, or leave the tensor out with --exclude"


class DeltaReader:
    """Reads Δ block by block: finetuned − base in float64, rounded once to float32.

    Args:
        files: the files of this thread.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._scratch, self._totals = np.zeros(SCRATCH), np.zeros(TOTALS)

    def measure(self, part: Part) -> tuple[float, bool]:
        """The sum of squares of Δ over the rows that base has too, and whether anything changed.

        Args:
            part: the tensor of Δ.

        Raises:
            NonFiniteError: at NaN or infinity.
            CheckpointError: if an input cannot be read.
        """
        block = np.empty(BLOCK_ELEMENTS, np.float32)
        ours, theirs = part.difference.sources
        squares, changed = 0.0, any(run.kind is RunKind.ADD for run in part.runs)
        for _, first, other, count in _blocks(part):
            squares += self._subtract(ours, theirs, first, other, block[:count])
            changed = changed or int(self._totals[2]) != count
        return squares, changed

    def matrix(self, part: Part) -> tuple[Matrix, float]:
        """Δ with base's rows, and the sum of its squares.

        Args:
            part: the tensor of Δ, of shape ``(rows, columns)``, with base's rows in place.

        Raises:
            NonFiniteError: at NaN or infinity.
            CheckpointError: if an input cannot be read.
        """
        ours, theirs = part.difference.sources
        rows, columns = max(ours.shape[0], theirs.shape[0]), ours.shape[1]
        made = np.zeros((rows, columns), np.float32)
        flat = made.reshape(-1)
        delta = stored_delta(part.difference, part.runs)
        squares = 0.0
        for place, first, other, count in _blocks(part):
            out = flat[place : place + count]
            if delta is None:
                squares += self._subtract(ours, theirs, first, other, out)
            else:
                squares += self._stored(delta, first, out)
        return made, squares

    def _subtract(
        self, ours: StoredTensor, theirs: StoredTensor, first: int, other: int, out: Matrix
    ) -> float:
        """Subtract consecutive elements; returns the sum of squares."""
        views = [
            self._files.memory(len(out) * BITS[spec.dtype] // 8, slot)
            for spec, slot in zip((ours, theirs), _INPUTS, strict=True)
        ]
        ours.read(self._files, first, views[0])
        theirs.read(self._files, other, views[1])
        compute = kernel("subtract", (ours.dtype, theirs.dtype, "F32"))
        addresses = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
        sums = self._scratch.ctypes.data, self._totals.ctypes.data
        if compute(*addresses, out.ctypes.data, len(out), *sums):
            raise _not_finite(ours, first, out)
        return float(self._totals[0])

    def _stored(self, delta: StoredTensor, first: int, out: Matrix) -> float:
        """Read consecutive elements of a Δ that is stored itself, in float64."""
        view = self._files.memory(len(out) * 8, _INPUTS[0])
        delta.read(self._files, first, view)
        values = np.frombuffer(view, "<f8")
        out[:] = values
        if not np.isfinite(out).all():
            raise _not_finite(delta, first, out)
        return float(np.square(values).sum())


def _blocks(part: Part) -> Iterator[tuple[int, int, int, int]]:
    """Place in the matrix, first elements in finetuned and base, and count of each block."""
    ours = part.difference.sources[0]
    last = part.runs[-1]
    width = ours.elements // (last.start + last.count) if ours.elements else 0
    for run in part.runs:
        if run.kind is not RunKind.GRAFT:
            continue
        total = run.count * width
        for done in range(0, total, BLOCK_ELEMENTS):
            count = min(BLOCK_ELEMENTS, total - done)
            first, other = (row * width + done for row in run.rows[:2])
            yield run.start * width + done, first, other, count


def _not_finite(spec: StoredTensor, first: int, out: Matrix) -> NonFiniteError:
    flat = first + int(np.argmin(np.isfinite(out)))
    index = tuple(int(i) for i in np.unravel_index(flat, spec.shape)) if spec.shape else ()
    problem = f"finetuned − base is NaN or infinite at {list(index)}"
    return NonFiniteError(spec.name, "finetuned", index, problem, _ALLOW)
