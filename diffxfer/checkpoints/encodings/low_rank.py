"""A product of two factors, as LoRA stores a difference: Δ = scaling·L·R.

PEFT's factors are ``lora_A``, of shape (rank, in), and ``lora_B``, of shape (out, rank). Which of
them is on the left, and in which order its elements are, depends on how the layer stores its
weight; `factors` knows the layouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from diffxfer.checkpoints.stored import BITS, StoredTensor

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import Files, TensorSpec

_TILE = 256
_LEFT, _RIGHT, _TILES = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor, and where its elements are.

    Attributes:
        spec: the tensor on disk.
        matrix: the distance of the factors of two matrices, in elements.
        outer: the distance of two rows of L, or of two columns of R.
        rank: the distance of two terms of the sum.
        first: the first element.
    """

    spec: TensorSpec
    matrix: int
    outer: int
    rank: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class LowRank(StoredTensor):
    """One or several matrices of low rank, in float64; the terms are summed in their order.

    Attributes:
        matrices: the number of matrices, 1 but for the experts of a fused layer.
        rows: rows of a matrix.
        columns: columns of a matrix.
        rank: terms of the sum.
        scaling: the factor of each sum.
        left: L.
        right: R.
    """

    source: ClassVar[str] = "the adapter"

    matrices: int
    rows: int
    columns: int
    rank: int
    scaling: float
    left: Factor
    right: Factor

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Both factors."""
        return self.left.spec, self.right.spec

    @property
    def parameters(self) -> tuple[object, ...]:
        """The scaling and the layout."""
        layout = ((f.matrix, f.outer, f.rank, f.first) for f in (self.left, self.right))
        return self.scaling, self.rank, self.rows, self.columns, *layout

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Compute elements."""
        each = self.rows * self.columns
        done, count = 0, len(buffer) // 8
        while done < count:
            matrix, inside = divmod(start + done, each)
            some = min(each - inside, count - done)
            self._compute(files, matrix, inside, buffer[done * 8 : (done + some) * 8])
            done += some

    def _compute(self, files: Files, matrix: int, start: int, buffer: memoryview) -> None:
        """Compute elements of one matrix."""
        from diffxfer.kernels.native import kernel

        count = len(buffer) // 8
        left, row, step = self._read_left(files, matrix, start, count)
        right, at = self._read_right(files, matrix)
        tiles = files.memory(self.rank * _TILE * 8, _TILES)
        compute = kernel("low_rank", (self.left.spec.dtype, self.right.spec.dtype, "F64"))
        compute(
            *map(_address, (left, right, buffer)),
            *(start, count, self.columns, self.rank),
            *(row, step, at, self.right.rank, self.right.outer),
            *(self.scaling, _address(tiles)),
        )

    def _read_left(
        self, files: Files, matrix: int, start: int, count: int
    ) -> tuple[memoryview, int, int]:
        """The rows of L for some elements, and the distances of its rows and terms."""
        factor = self.left
        first = start // self.columns
        rows = (start + count - 1) // self.columns + 1 - first
        at = factor.first + matrix * factor.matrix
        if factor.outer > 1 or self.rank == 1:  # the rows lie one after the other
            begin = at + first * factor.outer
            size = (rows - 1) * factor.outer + (self.rank - 1) * factor.rank + 1
            return files.read(factor.spec, begin, size, _LEFT), factor.outer, factor.rank
        itemsize = BITS[factor.spec.dtype] // 8
        memory = files.memory(self.rank * rows * itemsize, _LEFT)
        for k in range(self.rank):
            begin = at + k * factor.rank + first
            factor.spec.read(files, begin, memory[k * rows * itemsize : (k + 1) * rows * itemsize])
        return memory, 1, rows

    def _read_right(self, files: Files, matrix: int) -> tuple[memoryview, int]:
        """R of one matrix, or of all if they alternate; and the offset of its first element."""
        factor = self.right
        own = self.rank * self.columns
        at = factor.first + matrix * factor.matrix
        if (self.columns - 1) * factor.outer + (self.rank - 1) * factor.rank + 1 == own:
            return files.read(factor.spec, at, own, _RIGHT), 0
        return files.read(factor.spec, 0, factor.spec.elements, _RIGHT), at


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def linear(
    name: str, shape: tuple[int, ...], a: TensorSpec, b: TensorSpec, scaling: float
) -> LowRank:
    """Δ of a linear or convolutional layer: its weight has the shape (out, in, …).

    Args:
        name: the name of the weight.
        shape: its shape.
        a: ``lora_A`` of shape (rank, in, …).
        b: ``lora_B`` of shape (out, rank, …).
        scaling: alpha / rank.
    """
    rank, columns = a.shape[0], math.prod(a.shape[1:])
    left, right = Factor(b, 0, rank, 1), Factor(a, 0, 1, columns)
    size = (1, shape[0], columns, rank)
    return LowRank(name, "F64", shape, a.shard, *size, scaling, left, right)


def transposed(
    name: str, shape: tuple[int, ...], a: TensorSpec, b: TensorSpec, scaling: float
) -> LowRank:
    """Δ of an embedding, or of a layer that stores its weight as (in, out).

    Args:
        name: the name of the weight.
        shape: its shape, (in, out).
        a: ``lora_A`` of shape (rank, in).
        b: ``lora_B`` of shape (out, rank).
        scaling: alpha / rank.
    """
    rank = a.shape[0]
    left, right = Factor(a, 0, 1, shape[0]), Factor(b, 0, rank, 1)
    rows, columns = shape
    return LowRank(name, "F64", shape, a.shard, 1, rows, columns, rank, scaling, left, right)


def experts(
    name: str,
    shape: tuple[int, ...],
    a: TensorSpec,
    b: TensorSpec,
    scaling: float,
    *,
    is_transposed: bool,
) -> LowRank:
    """Δ of the fused experts of a layer; their factors alternate in ``lora_B``.

    Args:
        name: the name of the weights.
        shape: their shape, (experts, out, in), or (experts, in, out) if transposed.
        a: ``lora_A`` of shape (experts · rank, in).
        b: ``lora_B`` of shape (out, rank · experts).
        scaling: alpha / rank.
        is_transposed: whether the weights are stored as (in, out).
    """
    count, rows, columns = shape
    rank = a.shape[0] // count
    of_a = Factor(a, rank * a.shape[1], 1, a.shape[1])
    of_b = Factor(b, 1, rank * count, count)
    left, right = (of_a, of_b) if is_transposed else (of_b, of_a)
    size = (count, rows, columns, rank)
    return LowRank(name, "F64", shape, a.shard, *size, scaling, left, right)


def one_expert(
    name: str,
    shape: tuple[int, int],
    a: TensorSpec,
    b: TensorSpec,
    scaling: float,
    *,
    expert: tuple[int, int],
    row: int,
    is_transposed: bool,
) -> LowRank:
    """Δ of some rows of one expert, which is stored alone; its factors are those of `experts`.

    Args:
        name: the name of the weight.
        shape: its shape, ``(rows, columns)``.
        a: ``lora_A`` of shape (experts · rank, in).
        b: ``lora_B`` of shape (out, rank · experts).
        scaling: alpha / rank.
        expert: the number of the expert, and how many there are.
        row: the first of its rows in the expert's matrix.
        is_transposed: whether that matrix is stored as (in, out).
    """
    rows, columns = shape
    number, count = expert
    rank = a.shape[0] // count
    inner = a.shape[1]
    begin = number * rank * inner
    if is_transposed:
        left = Factor(a, 0, 1, inner, begin + row)
        right = Factor(b, 0, rank * count, count, number)
    else:
        left = Factor(b, 0, rank * count, count, number + row * rank * count)
        right = Factor(a, 0, 1, inner, begin)
    return LowRank(name, "F64", shape, a.shard, 1, rows, columns, rank, scaling, left, right)
