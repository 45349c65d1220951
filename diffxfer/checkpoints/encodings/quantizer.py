"""How values become codes and scales, block by block, as they are read.

Scales depend on whole blocks, so a read of some codes first reads the rows that their blocks cover.
Blocks of several rows belong to several chunks: threads compute their extremes together, and those
that were computed last are kept.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffxfer.checkpoints.encodings.chosen_scales import Chosen, shared_scale
from diffxfer.checkpoints.encodings.scaled_codes import addresses
from diffxfer.checkpoints.shared import Together

if TYPE_CHECKING:
    from diffxfer.checkpoints.encodings.chosen_scales import Recipe
    from diffxfer.checkpoints.encodings.scales import Grid
    from diffxfer.checkpoints.stored import Files, StoredTensor

    Floats = npt.NDArray[np.float32]
    Extremes = tuple[Floats, Floats]

_AT_ONCE = 1 << 18
_SMALL = 1 << 10
"""The memory of a finding without its arrays, in bytes."""
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
        grid, shared = self.grid, self.shared_scale(files)
        if grid.block[0] == 1:
            mins, maxs = _nothing(last + 1 - first, grid.columns)
            columns = grid.matrix[1]
            for at, some in self._spans(first * columns, (last + 1) * columns):
                self._widen(self._read(files, at, some), at, first, mins, maxs)
        else:
            found = [self._of_blocks(files, row) for row in range(first, last + 1)]
            mins = np.concatenate([each.mins for each in found])
            maxs = np.concatenate([each.maxs for each in found])
        return self.recipe.choose(mins, maxs, shared)

    def shared_scale(self, files: Files) -> np.float32:
        """The scale of the whole tensor; 1 if it has none.

        Args:
            files: opens the files.
        """
        if not self.shared:
            return np.float32(1)
        spans = _pieces(0, self.values.elements)
        found = files.shared.of(self.values, "most", _SMALL, lambda: _Extremes(1, 1, len(spans)))

        def widen(part: int) -> None:
            values = self._read(files, *spans[part])
            found.merge(values.min().reshape(1, 1), values.max().reshape(1, 1))

        found.together.finish(widen)
        return shared_scale(float(max(-found.mins.min(), found.maxs.max())))

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
        for at, some in _pieces(start, count):
            values = self.exact(files, at, some)
            row = grid.row(at // columns)
            factors = np.ascontiguousarray(chosen.factors[row - first :], np.float32)
            zeros = np.ascontiguousarray(chosen.zeros[row - first :], np.float32)
            encode(
                *addresses(values, factors, zeros, codes[at - start :]),
                *(recipe.kind, recipe.low, recipe.high, at, some, columns),
                *(*self._layout, row),
            )
        return codes, chosen

    def exact(self, files: Files, start: int, count: int) -> Floats:
        """Values before they are quantised; they are not computed again after `codes`.

        Args:
            files: opens the files.
            start: the first value.
            count: the number of values, at most `_AT_ONCE`.

        Returns:
            The values, valid until the next call.
        """
        columns = self.grid.matrix[1]
        begin, end = start, start + count
        if self.grid.block[0] == 1:
            whole = start // columns * columns, -(-end // columns) * columns
            if len(self._spans(*whole)) == 1:  # as `scales` has read them
                begin, end = whole
        return self._read(files, begin, end - begin)[start - begin :][:count]

    @property
    def _layout(self) -> tuple[int, ...]:
        grid = self.grid
        return grid.matrix[0], *grid.block, grid.rows, grid.columns

    def _spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Whole rows of values in pieces: one if they fit, with those that a chunk has in part."""
        if end - begin <= _AT_ONCE + 2 * min(self.grid.matrix[1], _AT_ONCE):
            return [(begin, end - begin)]
        return _pieces(begin, end - begin)

    def _read(self, files: Files, start: int, count: int) -> Floats:
        """Values, valid until the next call."""
        return np.frombuffer(files.read(self.values, start, count, _VALUES), np.float32)

    def _of_blocks(self, files: Files, block: int) -> _Extremes:
        """The extremes of a row of blocks, which the threads that need them compute together."""
        grid = self.grid
        matrix, inside = divmod(block, grid.rows)
        begin = matrix * grid.matrix[0] + inside * grid.block[0]
        end = min(begin + grid.block[0], (matrix + 1) * grid.matrix[0])
        columns = grid.matrix[1]
        spans = _pieces(begin * columns, (end - begin) * columns)
        size = grid.columns * 8 + _SMALL
        found = files.shared.of(
            self.values, block, size, lambda: _Extremes(1, grid.columns, len(spans))
        )

        def widen(part: int) -> None:
            at, some = spans[part]
            mins, maxs = _nothing(1, grid.columns)
            self._widen(self._read(files, at, some), at, block, mins, maxs)
            found.merge(mins, maxs)

        found.together.finish(widen)
        return found

    def _widen(self, values: Floats, at: int, first: int, mins: Floats, maxs: Floats) -> None:
        """Lower and raise extremes, from a row of blocks on, by some values."""
        from diffxfer.kernels.native import kernel

        widen = kernel("extremes", ("F32", "F32", "F32"))
        place = at, len(values), self.grid.matrix[1], *self._layout, first
        widen(*addresses(values, mins, maxs), *place)


class _Extremes:
    """The least and largest value of some blocks, and the work on them.

    Args:
        rows: rows of blocks.
        columns: columns of blocks.
        parts: the number of parts in which their values are read.
    """

    def __init__(self, rows: int, columns: int, parts: int) -> None:
        self.mins, self.maxs = _nothing(rows, columns)
        self.together = Together(parts)
        self._lock = threading.Lock()

    def merge(self, mins: Floats, maxs: Floats) -> None:
        """Add the extremes of a part."""
        with self._lock:
            np.minimum(self.mins, mins, out=self.mins)
            np.maximum(self.maxs, maxs, out=self.maxs)


def _nothing(rows: int, columns: int) -> Extremes:
    """The extremes of no value."""
    shape = rows, columns
    return np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)


def _pieces(start: int, count: int) -> list[tuple[int, int]]:
    """Values in pieces that are read at once: the first of each, and how many."""
    stop = start + count
    return [(at, min(_AT_ONCE, stop - at)) for at in range(start, stop, _AT_ONCE)]
