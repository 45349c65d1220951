"""How values become codes and scales, block by block, as they are read.

Scales depend on whole blocks, so a read of some codes first reads the rows that their blocks cover.
Nothing is kept but the extremes of a tensor whose blocks have many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffxfer.checkpoints.encodings.chosen_scales import Chosen, shared_scale
from diffxfer.checkpoints.encodings.scaled_codes import addresses

if TYPE_CHECKING:
    from diffxfer.checkpoints.encodings.chosen_scales import Recipe
    from diffxfer.checkpoints.encodings.scales import Grid
    from diffxfer.checkpoints.stored import Files, StoredTensor

    Floats = npt.NDArray[np.float32]
    Extremes = tuple[Floats, Floats]

_AT_ONCE = 1 << 18
_VALUES, _CODES = 20, 21


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How values become codes and scales.

    Attributes:
        values: the values, in float32.
        grid: the blocks, and where scales and zero points of the old values are.
        recipe: how scales are chosen.
        shared: whether all scales are divided by one of the whole tensor.
    """

    values: StoredTensor
    grid: Grid
    recipe: Recipe
    shared: bool = False

    def scales(self, files: Files, first: int, last: int) -> Chosen:
        """Choose the scales of some rows of blocks.

        Args:
            files: opens the files.
            first: the first row of blocks, counted over all matrices.
            last: the last one.

        Returns:
            Arrays of the shape (rows, columns of blocks).
        """
        if self.grid.block[0] == 1:
            mins, maxs = self._extremes(files, first, last)
        else:
            known = files.kept(self.values)
            for row in range(first, last + 1):
                if row not in known:
                    known[row] = self._extremes(files, row, row)
            mins = np.concatenate([known[row][0] for row in range(first, last + 1)])
            maxs = np.concatenate([known[row][1] for row in range(first, last + 1)])
        return self.recipe.choose(mins, maxs, self.shared_scale(files))

    def shared_scale(self, files: Files) -> np.float32:
        """The scale of the whole tensor; 1 if it has none.

        Args:
            files: opens the files.
        """
        if not self.shared:
            return np.float32(1)
        known = files.kept(self.values)
        if "most" not in known:
            most = 0.0
            for start in range(0, self.values.elements, _AT_ONCE):
                count = min(_AT_ONCE, self.values.elements - start)
                most = max(most, float(np.abs(self._read(files, start, count)).max()))
            known["most"] = most
        return shared_scale(known["most"])

    def codes(self, files: Files, start: int, count: int) -> tuple[npt.NDArray[np.uint8], Chosen]:
        """Quantise some values.

        Args:
            files: opens the files.
            start: the first value.
            count: the number of values, at least one.

        Returns:
            A code of a byte for each, valid until the next call, and the scales of their blocks.
        """
        from diffxfer.kernels.native import kernel

        grid = self.grid
        columns = grid.matrix[1]
        first, last = grid.row(start // columns), grid.row((start + count - 1) // columns)
        chosen = self.scales(files, first, last)
        codes = np.frombuffer(files.memory(count, _CODES), np.uint8)[:count]
        encode, recipe = kernel("encode", ("F32", "F32", "F32", "U8")), self.recipe
        for done in range(0, count, _AT_ONCE):
            at, some = start + done, min(_AT_ONCE, count - done)
            values = self._read(files, at, some)
            row = grid.row(at // columns)
            factors = np.ascontiguousarray(chosen.factors[row - first :], np.float32)
            zeros = np.ascontiguousarray(chosen.zeros[row - first :], np.float32)
            layout = grid.matrix[0], *grid.block, grid.rows, grid.columns, row
            encode(
                *addresses(values, factors, zeros, codes[done:]),
                *(recipe.kind, recipe.low, recipe.high, at, some, columns),
                *layout,
            )
        return codes, chosen

    def _read(self, files: Files, start: int, count: int) -> Floats:
        """Values, valid until the next call."""
        memory = files.memory(count * 4, _VALUES)
        self.values.read(files, start, memory)
        return np.frombuffer(memory, np.float32)

    def _extremes(self, files: Files, first: int, last: int) -> Extremes:
        """The least and largest value of each block, in rows of blocks."""
        grid = self.grid
        shape = last + 1 - first, grid.columns
        mins, maxs = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
        for block in range(first, last + 1):
            matrix, inside = divmod(block, grid.rows)
            begin = matrix * grid.matrix[0] + inside * grid.block[0]
            end = min(begin + grid.block[0], (matrix + 1) * grid.matrix[0])
            at = block - first
            self._reduce(files, begin, end, mins[at], maxs[at])
        return mins, maxs

    def _reduce(self, files: Files, begin: int, end: int, mins: Floats, maxs: Floats) -> None:
        """Lower and raise the extremes of a row of blocks by some rows of values."""
        columns, width = self.grid.matrix[1], self.grid.block[1]
        step = max(_AT_ONCE // max(columns, 1), 1)
        starts = np.arange(0, columns, width)
        for row in range(begin, end, step):
            rows = min(step, end - row)
            for left in range(0, columns, _wide(width)):
                some = min(_wide(width), columns - left) if rows == 1 else columns
                values = self._read(files, row * columns + left, rows * some).reshape(rows, some)
                low, high = values.min(axis=0), values.max(axis=0)
                inside = starts[left // width :][: -(-some // width)] - left
                place = slice(left // width, left // width + len(inside))
                np.minimum(mins[place], np.minimum.reduceat(low, inside), out=mins[place])
                np.maximum(maxs[place], np.maximum.reduceat(high, inside), out=maxs[place])
                if rows > 1:
                    break


def _wide(width: int) -> int:
    """The most columns to read at once: whole blocks, or as many as fit if a block is wider."""
    return max(_AT_ONCE // width, 1) * width
