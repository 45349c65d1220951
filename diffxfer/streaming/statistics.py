"""Combining the results of chunks into results of tensors."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.streaming.checksum import combine
from diffxfer.streaming.plan import Operation, Plan, chunks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.encodings.exceptions import Exceptions

_SAMPLE = struct.Struct("<qd")


@dataclass(slots=True)
class ChunkResult:
    """The result of a chunk.

    Attributes:
        digests: digests of the output's blocks.
        input_digests: digests of an input's blocks, if it is read in order: base's for a
            difference, the diff vector's for a graft of one.
        inexact: number of elements of finetuned that base + the stored Δ does not give back.
        unchanged: number of elements that are equal in finetuned and base.
        delta_squares: sums of Δ², one per block.
        base_squares: sums of base², one per block.
        samples: elements of base, each as index of the output and value.
        other_squares: sums of B², one per block, if A and B are compared.
        sums: what the kernels of distances have summed, one tuple per block.
        exceptions: elements of an exact difference's chunk that base + Δ does not give back.
    """

    digests: bytes = b""
    input_digests: bytes = b""
    inexact: int = 0
    unchanged: int = 0
    delta_squares: tuple[float, ...] = ()
    base_squares: tuple[float, ...] = ()
    samples: tuple[tuple[int, float], ...] = ()
    other_squares: tuple[float, ...] = ()
    sums: tuple[tuple[float, ...], ...] = ()
    exceptions: tuple[Exceptions, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorResult:
    """The result of a tensor.

    There is one per tensor, so fields are stored as bytes where that saves memory.

    Attributes:
        digest: the checksum of the output, or of the input if nothing is written.
        input_digest: the checksum of that input, empty if it was not read in order.
        inexact: number of elements of finetuned that base + the stored Δ does not give back.
        delta_norm: ‖Δ‖₂ before rounding.
        base_norm: ‖base‖₂.
        packed_samples: elements of base, each as index of the output and value, ascending.
        unchanged: number of elements that are equal in finetuned and base.
        other_norm: ‖B‖₂, if A and B are compared; then ‖A‖₂ is `base_norm`, and Δ is B − A.
        sums: what the kernels of distances have summed; empty if no element was compared.
    """

    digest: bytes
    input_digest: bytes
    inexact: int
    delta_norm: float
    base_norm: float
    packed_samples: bytes
    unchanged: int
    other_norm: float
    sums: tuple[float, ...] = ()

    @property
    def checksum(self) -> str:
        """The output's checksum, or the input's if nothing is written, in hexadecimal."""
        return self.digest.hex()

    @property
    def input_checksum(self) -> str | None:
        """The checksum of the input that was digested, in hexadecimal; None if none was."""
        return self.input_digest.hex() or None

    @property
    def samples(self) -> tuple[tuple[int, float], ...]:
        """Elements of base, each as index of the output and value, ascending."""
        return tuple(_SAMPLE.iter_unpack(self.packed_samples))


@dataclass(slots=True)
class _Parts:
    missing: int
    digests: dict[int, bytes] = field(default_factory=dict)
    input_digests: dict[int, bytes] = field(default_factory=dict)
    delta_squares: list[float] = field(default_factory=list)
    base_squares: list[float] = field(default_factory=list)
    samples: list[tuple[int, float]] = field(default_factory=list)
    inexact: int = 0
    unchanged: int = 0
    other_squares: list[float] = field(default_factory=list)
    sums: list[tuple[float, ...]] = field(default_factory=list)


class Statistics:
    """The results so far. Only unfinished tensors take more memory than their result.

    Args:
        plan: the plan.
        chunk_elements: the most elements of a chunk.
    """

    def __init__(self, plan: Plan, chunk_elements: int) -> None:
        self._plan = plan
        self._chunk_elements = chunk_elements
        self._parts: dict[int, _Parts] = {}
        self._results: list[TensorResult | None] = [
            None if task.elements else TensorResult(combine({}), b"", 0, 0.0, 0.0, b"", 0, 0.0)
            for task in plan.tasks
        ]

    def add(self, index: int, start: int, result: ChunkResult) -> None:
        """Add the result of a chunk; not thread-safe.

        Args:
            index: the index of the chunk's task.
            start: the chunk's first element in the output tensor.
            result: its result.
        """
        task = self._plan.tasks[index]
        parts = self._parts.get(index)
        if parts is None:
            parts = self._parts[index] = _Parts(chunks_of(task, self._chunk_elements))
        parts.missing -= 1
        parts.digests[start] = result.digests
        parts.inexact += result.inexact
        parts.unchanged += result.unchanged
        if task.operation is Operation.CONTRAST:
            parts.delta_squares += result.delta_squares
            parts.base_squares += result.base_squares
            parts.other_squares += result.other_squares
        parts.sums += result.sums
        if result.input_digests:
            parts.input_digests[start] = result.input_digests
        if task.operation in (Operation.SUBTRACT, Operation.EXACT, Operation.STORE):
            parts.delta_squares += result.delta_squares
            parts.base_squares += result.base_squares
            parts.samples += result.samples
        if parts.missing == 0:
            self._results[index] = _finish(self._parts.pop(index))

    def results(self) -> Sequence[TensorResult]:
        """One result per task, once all are done."""
        done = [result for result in self._results if result is not None]
        assert len(done) == len(self._results), "the plan has not run to its end"
        return done


def _finish(parts: _Parts) -> TensorResult:
    return TensorResult(
        combine(parts.digests),
        combine(parts.input_digests) if parts.input_digests else b"",
        parts.inexact,
        _norm(parts.delta_squares),
        _norm(parts.base_squares),
        b"".join([_SAMPLE.pack(*sample) for sample in sorted(parts.samples)]),
        parts.unchanged,
        _norm(parts.other_squares),
        tuple([exact_sum(column) for column in zip(*parts.sums, strict=True)]),
    )


def exact_sum(numbers: Sequence[float]) -> float:
    """The sum, whatever the order of the numbers; NaN or infinity if it has no finite value.

    Args:
        numbers: the sums of blocks.
    """
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf
    except ValueError:  # infinity of both signs
        return math.nan


def norm(square: float) -> float:
    """The root of a sum of squares, in nine digits: the last ones depend on the processor.

    Args:
        square: the sum.
    """
    return float(f"{math.sqrt(square):.9g}")


def _norm(squares: Sequence[float]) -> float:
    # `fsum` is exact, so the order in which blocks were finished has no effect.
    # 0.0 is one object for all tensors without squares.
    return norm(exact_sum(squares)) if squares else 0.0
