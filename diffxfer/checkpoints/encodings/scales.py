"""The scales of a quantised matrix: one for each block of it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from diffxfer.checkpoints.stored import Files, TensorSpec

    Floats = npt.NDArray[np.float32]

SCALE_DTYPES = frozenset({"F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "U8"})
"""The dtypes of scales; one byte without a float's dtype is an exponent of 2, with bias 127."""
_AGAIN = "download or save it again"
_SCALE, _ZERO, _SHARED = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales of blocks, in the order of the blocks, for one or several matrices.

    Attributes:
        scale: the tensor of scales.
        matrix: rows and columns of a matrix.
        block: rows and columns of a block.
        shared: a float32 by which every scale is divided; None if there is none.
        zero: the zero points, one for each scale; None if they are zero.
        zero_bits: 4 if `zero` has eight to an int32, along the rows; 8 if it has one to an int8.
        zero_scale: whether a scale may be zero, for a block of zeros.
    """

    scale: TensorSpec
    matrix: tuple[int, int]
    block: tuple[int, int]
    shared: TensorSpec | None = None
    zero: TensorSpec | None = None
    zero_bits: int = 8
    zero_scale: bool = False

    @property
    def rows(self) -> int:
        """Rows of scales of one matrix."""
        return -(-self.matrix[0] // self.block[0])

    @property
    def columns(self) -> int:
        """Columns of scales."""
        return -(-self.matrix[1] // self.block[1])

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors on disk."""
        return tuple(part for part in (self.scale, self.shared, self.zero) if part is not None)

    @property
    def in_words(self) -> str:
        """What has a scale, such as ``"blocks of 128 × 128"``."""
        zero = "" if self.zero is None else ", zero points"
        if self.scale.elements <= 1:
            return f"one scale{zero}"
        if self.block[0] > 1 or self.matrix[0] == 1:
            return f"blocks of {_of(self.block)}{zero}"
        whole = self.block[1] >= self.matrix[1]
        return f"{'a scale a row' if whole else f'groups of {self.block[1]}'}{zero}"

    def row(self, row: int) -> int:
        """The row of scales for a row of values, counted over all matrices."""
        matrix, inside = divmod(row, self.matrix[0])
        return matrix * self.rows + inside // self.block[0]

    def read(self, files: Files, first: int, last: int) -> tuple[Floats, Floats]:
        """Read the scales and zero points of some rows.

        Args:
            files: opens the files.
            first: the first row of scales.
            last: the last one.

        Returns:
            The scales and the zero points, each of shape (rows, columns).

        Raises:
            CheckpointError: if a scale is NaN, infinite, negative or zero.
        """
        import numpy as np

        count = (last + 1 - first) * self.columns
        data = files.read(self.scale, first * self.columns, count, _SCALE)
        scales = scales_in_float32(data, self.scale.dtype)
        if self.shared is not None:
            shared = scales_in_float32(files.read(self.shared, 0, 1, _SHARED), self.shared.dtype)
            _refuse_bad(shared, self.shared, 0)
            with np.errstate(all="ignore"):  # what is not finite is refused
                scales = scales / shared[0]
        _refuse_bad(scales, self.scale, first * self.columns, zero=self.zero_scale)
        shape = last + 1 - first, self.columns
        return scales.reshape(shape), self._zeros(files, first, last).reshape(shape)

    def _zeros(self, files: Files, first: int, last: int) -> Floats:
        import numpy as np

        if self.zero is None:
            return np.zeros((last + 1 - first) * self.columns, np.float32)
        if self.zero_bits == 8:
            begin, count = first * self.columns, (last + 1 - first) * self.columns
            return np.frombuffer(files.read(self.zero, begin, count, _ZERO), np.int8).astype("f4")
        begin, end = first // 8, last // 8 + 1
        count = (end - begin) * self.columns
        words = np.frombuffer(files.read(self.zero, begin * self.columns, count, _ZERO), "<u4")
        shifts = np.arange(8, dtype=np.uint32)[None, :, None] * np.uint32(4)
        nibbles = (words.reshape(-1, 1, self.columns) >> shifts) & np.uint32(15)
        rows = nibbles.reshape(-1, self.columns)[first - begin * 8 : last + 1 - begin * 8]
        zeros: Floats = rows.astype(np.float32).reshape(-1) - np.float32(8)
        return zeros


def scales_in_float32(data: memoryview, dtype: str) -> Floats:
    """Convert stored scales to float32.

    Args:
        data: their bytes.
        dtype: one of `SCALE_DTYPES`.
    """
    import numpy as np

    if dtype == "F32":
        return np.frombuffer(data, "<f4")
    if dtype == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    codes = np.frombuffer(data, np.uint8)
    found: Floats = (_e4m3_values() if dtype == "F8_E4M3" else _e8m0_values())[codes]
    return found


def checked_scales(data: memoryview, part: TensorSpec, begin: int, *, zero: bool = False) -> Floats:
    """Convert stored scales to float32, and check them.

    Args:
        data: their bytes.
        part: the tensor that they are from.
        begin: the first one.
        zero: whether zero is valid, for a block of zeros.

    Raises:
        CheckpointError: if a scale is NaN, infinite or negative, or is zero where that is invalid.
    """
    scales = scales_in_float32(data, part.dtype)
    _refuse_bad(scales, part, begin, zero=zero)
    return scales


@functools.cache
def _e4m3_values() -> Floats:
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    small = np.ldexp(mantissa, -9)
    values = np.where(exponent == 0, small, np.ldexp(8 + mantissa, exponent - 10))
    values = np.where((codes & 127) == 127, np.nan, values)
    return np.where(codes & 128, -values, values).astype(np.float32)


@functools.cache
def _e8m0_values() -> Floats:
    import numpy as np

    values = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


def _refuse_bad(scales: Floats, part: TensorSpec, begin: int, *, zero: bool = False) -> None:
    """Refuse scales that are not positive and finite."""
    import numpy as np

    good = np.isfinite(scales) & (scales >= 0 if zero else scales > 0)
    if not good.all():
        at = int(np.argmin(good))
        index = list(map(int, np.unravel_index(begin + at, part.shape or (1,))))
        problem = f"{part.name} has the scale {scales[at]:g} at {index}, expected a positive number"
        raise CheckpointError(part.shard.path, problem, _AGAIN)


def grid_of(
    codes: TensorSpec,
    shape: tuple[int, ...],
    scale: TensorSpec,
    block: tuple[int, int] | None,
) -> Grid:
    """The grid of a tensor's scales, with the block size that their shape shows.

    Args:
        codes: the quantised tensor.
        shape: the shape of its values.
        scale: its scales: one, one for each row, or one for each block.
        block: the block size that the config states; None if it states none.

    Raises:
        CheckpointError: if the scales have another dtype, or their shape does not fit.
    """
    if scale.dtype not in SCALE_DTYPES:
        problem = f"{scale.name} is {scale.dtype}, expected {' or '.join(sorted(SCALE_DTYPES))}"
        raise CheckpointError(scale.shard.path, problem, _AGAIN)
    elements: int = math.prod(shape)
    matrix = (shape[-2], shape[-1]) if len(shape) > 1 else (1, elements)
    matrices = math.prod(size for size in shape[:-2])
    each = scale.elements // matrices if matrices and scale.elements % matrices == 0 else 0
    found = Grid(scale, matrix, _block(each, scale.shape, matrix, block))
    if not _fits(found, each) or (each == 0 and elements):
        expected = f"{found.rows} × {found.columns}, one for each block of {_of(found.block)}"
        problem = f"{scale.name} is {scale.shape} for {codes.name} of {shape}, expected {expected}"
        raise CheckpointError(scale.shard.path, problem, _AGAIN)
    return found


def _fits(grid: Grid, each: int) -> bool:
    """Whether each matrix has one scale, or those of its blocks in rows and columns of blocks."""
    shown = _without_ones(grid.scale.shape)
    in_order = len(shown) < 2 or each == 1 or shown[-2:] == (grid.rows, grid.columns)
    return in_order and each == grid.rows * grid.columns


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales without the dimensions of blocks that Model Optimizer adds."""
    return (shape[0], shape[2]) if len(shape) == 4 and shape[1] == shape[3] == 1 else shape


def _block(
    each: int, shape: tuple[int, ...], matrix: tuple[int, int], block: tuple[int, int] | None
) -> tuple[int, int]:
    """The size of a block: as stated, but for one scale a matrix, or one a row."""
    rows, columns = max(matrix[0], 1), max(matrix[1], 1)
    shape = _without_ones(shape)
    if each == 1:
        return rows, columns
    if each == rows and (len(shape) == 1 or shape[-1] == 1):
        return 1, columns
    if block is not None:
        return block
    # As transformers does: the block size that the shape of the scales divides evenly into.
    if len(shape) > 1 and shape[-2] and shape[-1]:
        return -(-rows // shape[-2]), -(-columns // shape[-1])
    return rows, columns


def _of(block: tuple[int, int]) -> str:
    return f"{block[0]} × {block[1]}"
