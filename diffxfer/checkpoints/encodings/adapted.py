"""Tensors of base that an adapter changes: what `merge_and_unload` would make of them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from diffxfer.checkpoints import values
from diffxfer.checkpoints.stored import BITS, StoredTensor

if TYPE_CHECKING:
    from diffxfer.checkpoints.encodings.low_rank import LowRank
    from diffxfer.checkpoints.stored import Files, TensorSpec

Values = npt.NDArray[np.float64]

# Numbers of memory that no encoding of base uses.
_DELTA, _WEIGHT, _DORA, _ROWS = 30, 31, 32, 33
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class Adapted(StoredTensor):
    """base + Δ, computed in float64 and rounded once: to base's dtype, or to a wider one.

    Attributes:
        base: the tensor of base.
        delta: Δ, in float64.
    """

    base: StoredTensor
    delta: StoredTensor

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The parts of Δ and of base."""
        return *self.base.parts, *self.delta.parts

    @property
    def written_dtype(self) -> str:
        """Base's, unless the dtype is wider than base's."""
        return self.base.written_dtype if self.dtype == self.base.dtype else self.dtype

    @property
    def parameters(self) -> tuple[object, ...]:
        """Those of base and Δ."""
        return *self.base.parameters, *self.delta.parameters

    def minus(self, other: StoredTensor) -> StoredTensor | None:
        """Δ, if the other tensor is base's."""
        same = other.parts == self.base.parts and other.parameters == self.base.parameters
        return self.delta if same else None

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Compute elements."""
        size = BITS[self.dtype] // 8
        for done in range(0, len(buffer) // size, _AT_ONCE):
            part = buffer[done * size : (done + _AT_ONCE) * size]
            count = len(part) // size
            # Δ may need base's values too, so it is computed first.
            delta = files.memory(count * 8, _DELTA)
            self.delta.read(files, start + done, delta)
            if self.base.dtype == self.dtype:
                self._add(files, delta, start + done, part)
            else:
                weight = in_float64(files, self.base, start + done, count)
                np.frombuffer(part, _NUMPY[self.dtype])[:] = weight + np.frombuffer(delta, "<f8")

    def _add(self, files: Files, delta: memoryview, start: int, buffer: memoryview) -> None:
        """Read base's elements, and add Δ in place."""
        from diffxfer.kernels.native import kernel

        self.base.read(files, start, buffer)
        at, count = _address(buffer), len(delta) // 8
        kernel("apply", ("F64", self.dtype, self.dtype))(_address(delta), at, at, count, 1.0)


@dataclass(frozen=True, slots=True)
class Scaled(StoredTensor):
    """A tensor times a number, in float64: the bias of ``lora_B``.

    Attributes:
        values: the tensor.
        scaling: the number.
    """

    source: ClassVar[str] = "the adapter"

    values: TensorSpec
    scaling: float

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensor."""
        return (self.values,)

    @property
    def parameters(self) -> tuple[object, ...]:
        """The number."""
        return (self.scaling,)

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Compute elements."""
        out = np.frombuffer(buffer, "<f8")
        np.multiply(in_float64(files, self.values, start, len(out)), self.scaling, out=out)


@dataclass(frozen=True, slots=True)
class Dora(StoredTensor):
    """Δ of DoRA, in float64: W·(f − 1) + f·Δ, where f = magnitude / ‖W + Δ‖ for each output.

    It is m·(W + Δ)/‖W + Δ‖ − W (arXiv 2402.09353), written so that no digits of Δ cancel.

    Attributes:
        base: W.
        delta: Δ of the factors.
        magnitude: m, one number for each output of the layer.
        by_column: whether the outputs are the columns of W, not its rows: for an embedding, or a
            layer that stores its weight as (in, out).
    """

    source: ClassVar[str] = "the adapter"

    base: StoredTensor
    delta: LowRank
    magnitude: TensorSpec
    by_column: bool

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The parts of Δ, base and the magnitudes."""
        return *self.delta.parts, self.magnitude, *self.base.parts

    @property
    def parameters(self) -> tuple[object, ...]:
        """Those of Δ, and what its outputs are."""
        return *self.delta.parameters, self.by_column

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Compute elements."""
        out = np.frombuffer(buffer, "<f8")
        columns = self.delta.columns
        for done in range(0, len(out), _AT_ONCE):
            part = out[done : done + _AT_ONCE]
            at = start + done
            first, last = at // columns, (at + len(part) - 1) // columns + 1
            # Before the rows are read: it uses the same memory for others.
            by_column = files.derived(self, self._column_factors) if self.by_column else None
            weight, delta = self._rows(files, first, last)
            if by_column is None:
                factor = self._row_factors(files, weight + delta, first)[:, None]
            else:
                factor = by_column
            with np.errstate(all="ignore"):  # the engine reports what is not finite
                made = weight * (factor - 1.0) + delta * factor
            part[:] = made.reshape(-1)[at - first * columns :][: len(part)]

    def _rows(self, files: Files, first: int, last: int) -> tuple[Values, Values]:
        """Some rows of W and of Δ."""
        columns = self.delta.columns
        count = (last - first) * columns
        delta = files.memory(count * 8, _DORA)
        self.delta.read(files, first * columns, delta)
        weight = in_float64(files, self.base, first * columns, count)
        shape = last - first, columns
        return weight.reshape(shape), np.frombuffer(delta, "<f8").reshape(shape)

    def _row_factors(self, files: Files, rows: Values, first: int) -> Values:
        """Magnitude / norm of some rows of W + Δ."""
        # Row by row, so that no sum depends on which rows are computed together.
        norms = np.sqrt([np.add.reduce(row * row) for row in rows])
        magnitudes = in_float64(files, self.magnitude, first, len(rows))
        with np.errstate(all="ignore"):
            return np.asarray(magnitudes / norms)

    def _column_factors(self, files: Files) -> Values:
        """Magnitude / norm of all columns of W + Δ, in one pass over W."""
        columns = self.delta.columns
        squares = np.zeros(columns)
        step = max(_AT_ONCE // columns, 1)
        for first in range(0, self.delta.rows, step):
            weight, delta = self._rows(files, first, min(first + step, self.delta.rows))
            for row in weight + delta:
                squares += row * row
        magnitudes = in_float64(files, self.magnitude, 0, columns)
        with np.errstate(all="ignore"):
            return np.asarray(magnitudes / np.sqrt(squares))


@dataclass(frozen=True, slots=True)
class ReplacedRows(StoredTensor):
    """A tensor of base in which some rows are replaced: trained rows of tokens.

    Attributes:
        base: the tensor of base.
        rows: the new rows.
        indices: where they belong, ascending.
        order: which of `rows` belongs there.
    """

    base: StoredTensor
    rows: TensorSpec
    indices: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The parts of base, and the rows."""
        return *self.base.parts, self.rows

    @property
    def parameters(self) -> tuple[object, ...]:
        """Those of base, and which rows are replaced."""
        return *self.base.parameters, self.indices, self.order

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Read elements."""
        dtype = "<f8" if self.dtype == "F64" else "<f4"
        out = np.frombuffer(buffer, dtype)
        # Base may be computed itself, and need all other memory.
        out[:] = in_float64(files, self.base, start, len(out), _ROWS)
        width = self.shape[1]
        stop = start + len(out)
        for place in range(bisect_left(self.indices, start // width), len(self.indices)):
            begin = self.indices[place] * width
            if begin >= stop:
                break
            low, high = max(begin, start), min(begin + width, stop)
            at = self.order[place] * width + low - begin
            out[low - start : high - start] = in_float64(files, self.rows, at, high - low)


def in_float64(
    files: Files, stored: StoredTensor, start: int, count: int, slot: int = _WEIGHT
) -> Values:
    """Some elements of a tensor, in float64.

    Args:
        files: the files of this thread.
        stored: the tensor.
        start: the first element.
        count: the number of elements.
        slot: the memory to use.
    """
    memory = files.memory(count * BITS[stored.dtype] // 8, slot)
    stored.read(files, start, memory)
    return values.in_float64(values.elements(memory, stored.dtype), stored.dtype)


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data
