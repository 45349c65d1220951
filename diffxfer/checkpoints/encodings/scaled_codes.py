"""Quantised weights: a code for each value, and a scale for each block of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import BITS, StoredTensor
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from diffxfer.checkpoints.encodings.scales import Floats, Grid
    from diffxfer.checkpoints.stored import Files, TensorSpec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a float of 4 bits (OCP Microscaling Formats, 2023)."""
INT4 = tuple(float(code - 8) for code in range(16))
"""The values of an integer of 4 bits, stored with 8 added."""
_CODES, _SHAPE = 0, 4
_KINDS = {"F8_E4M3": "E4M3", "I8": "int8"}


@dataclass(frozen=True, slots=True)
class ScaledCodes(StoredTensor):
    """Values in float32: (code − zero)·scale, of codes that take a byte each.

    Attributes:
        codes: float8 E4M3, or int8.
        grid: the scales and zero points.
        powers_of_two: whether the config says that every scale is a power of 2.
    """

    codes: TensorSpec
    grid: Grid
    powers_of_two: bool = False

    @property
    def written_dtype(self) -> str:
        """bfloat16: its range is that of the decoded float32."""
        return "BF16"

    @property
    def encoding(self) -> str:
        """The kind of number, and the size of a block."""
        return f"{_KINDS.get(self.codes.dtype, self.codes.dtype)}, {self.grid.in_words}"

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The codes and their scales."""
        return self.codes, *self.grid.parts

    @property
    def parameters(self) -> tuple[object, ...]:
        """The size of a block."""
        return (self.grid.block,)

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements."""
        from diffxfer.kernels.native import kernel

        count, columns = len(buffer) // 4, self.grid.matrix[1]
        first, scales, zeros = rows_of_scales(files, self.grid, start, count)
        codes = files.read(self.codes, start, count, _CODES)
        place = start, count, columns, *_layout(self.grid), first
        if self.codes.dtype == "I8":
            decode = kernel("decode_int8", ("U8", "F32", "F32", "F32"))
            decode(*addresses(codes, scales, zeros, buffer), *place)
        else:
            decode = kernel("decode_e4m3", ("U8", "F32", "F32"))
            decode(*addresses(codes, scales, buffer), *place)


@dataclass(frozen=True, slots=True)
class PackedCodes(StoredTensor):
    """Values in float32: (table[code] − zero)·scale, of codes that take 4 bits each.

    Attributes:
        codes: the codes, two to a byte or eight to an int32, row by row.
        grid: the scales and zero points.
        table: the value of each of the 16 codes.
        stride: the codes that a row takes on disk, with those that fill its last word.
        high_first: whether the upper half of a byte comes first.
        other: tensors that contain the shape of the values, which must agree.
    """

    codes: TensorSpec
    grid: Grid
    table: tuple[float, ...]
    stride: int
    high_first: bool = False
    other: tuple[TensorSpec, ...] = ()

    @property
    def written_dtype(self) -> str:
        """bfloat16: its range is that of the decoded float32."""
        return "BF16"

    @property
    def encoding(self) -> str:
        """The kind of number, and the size of a block."""
        kind = {E2M1: "E2M1", INT4: "int4"}.get(self.table, "4 bits")
        return f"{kind}, {self.grid.in_words}"

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The codes, their scales, and what belongs to them."""
        return self.codes, *self.grid.parts, *self.other

    @property
    def parameters(self) -> tuple[object, ...]:
        """The size of a block, and the table."""
        return self.grid.block, self.table, self.stride, self.high_first

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements."""
        import numpy as np

        from diffxfer.kernels.native import kernel

        self._check_shape(files)
        count, columns = len(buffer) // 4, self.grid.matrix[1]
        first, scales, zeros = rows_of_scales(files, self.grid, start, count)
        # Whole elements of the part: a byte has two codes, an int32 eight.
        each = BITS[self.codes.dtype] // 4
        begin, end = (self._place(at) // each for at in (start, start + count - 1))
        codes = files.read(self.codes, begin, end + 1 - begin, _CODES)
        decode = kernel("decode_nibbles", ("U8", "F32", "F32", "F32", "F32"))
        arrays = codes, np.array(self.table, np.float32), scales, zeros, buffer
        decode(
            *addresses(*arrays),
            *(start, count, columns, self.stride, begin * each, int(self.high_first)),
            *(*_layout(self.grid), first),
        )

    def _check_shape(self, files: Files) -> None:
        for stated in self.other:
            found = stored_shape(files, stated)
            if found != self.shape:
                problem = f"{stated.name} contains {found}, expected {self.shape} by the scales"
                raise CheckpointError(stated.shard.path, problem, "download or save it again")

    def _place(self, element: int) -> int:
        """The position of an element's code on disk, counted in codes."""
        row, column = divmod(element, self.grid.matrix[1])
        return row * self.stride + column


def stored_shape(files: Files, part: TensorSpec) -> tuple[int, ...]:
    """The shape that a tensor contains.

    Args:
        files: opens the files.
        part: the tensor, of int32 or int64.
    """
    import numpy as np

    kind = "<i8" if part.dtype == "I64" else "<i4"
    return tuple(map(int, np.frombuffer(files.read(part, 0, part.elements, _SHAPE), kind)))


def rows_of_scales(files: Files, grid: Grid, start: int, count: int) -> tuple[int, Floats, Floats]:
    """Read the scales for some elements.

    Args:
        files: opens the files.
        grid: the scales.
        start: the first element.
        count: number of elements, at least one.

    Returns:
        The row of scales that is the first, the scales and the zero points.

    Raises:
        CheckpointError: if a scale is NaN, infinite, negative or zero.
    """
    columns = grid.matrix[1]
    first, last = grid.row(start // columns), grid.row((start + count - 1) // columns)
    return first, *grid.read(files, first, last)


def _layout(grid: Grid) -> tuple[int, ...]:
    return grid.matrix[0], *grid.block, grid.rows, grid.columns


def addresses(*arrays: memoryview | npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> list[int]:
    """The addresses of the first bytes of some arrays.

    Args:
        arrays: contiguous memory, which the caller keeps.
    """
    import numpy as np

    return [np.frombuffer(array, np.uint8).ctypes.data for array in arrays]
