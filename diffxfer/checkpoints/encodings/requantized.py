"""Values quantised anew, in the encoding of another tensor: computed when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffxfer.checkpoints.encodings.scaled_codes import addresses
from diffxfer.checkpoints.shared import Together
from diffxfer.checkpoints.stored import BITS, StoredTensor

if TYPE_CHECKING:
    from diffxfer.checkpoints.encodings.quantizer import Quantizer
    from diffxfer.checkpoints.stored import Files, TensorSpec

    Floats = npt.NDArray[np.float32]

_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class _Part(StoredTensor):
    """A tensor on disk that is computed from values: the common part of the kinds below.

    Attributes:
        quantizer: computes it.
    """

    quantizer: Quantizer

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors that the values are made of."""
        return self.quantizer.values.parts

    @property
    def parameters(self) -> tuple[object, ...]:
        """What the values depend on, and the blocks."""
        quantizer = self.quantizer
        recipe = quantizer.recipe
        return (
            *quantizer.values.parameters,
            *(type(self).__name__, quantizer.grid.block, quantizer.shared),
            *(recipe.kind, recipe.low, recipe.high),
        )

    @property
    def times(self) -> int:
        """How often each value is computed, if errors are measured before codes are written.

        The extremes of blocks of several rows, and of a whole tensor, are known then.
        """
        return 1

    def bytes_to_read(self, count: int) -> int:
        """The bytes read for some of its elements."""
        values = self.quantizer.values
        return self.times * values.bytes_to_read(values.elements * count // max(self.elements, 1))


@dataclass(frozen=True, slots=True)
class NewCodes(_Part):
    """Codes of a byte each."""

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Quantise values."""
        codes, _ = self.quantizer.codes(files, start, len(buffer))
        np.frombuffer(buffer, np.uint8)[:] = codes


@dataclass(frozen=True, slots=True)
class NewPackedCodes(_Part):
    """Codes of 4 bits, two to a byte with the lower half first; a row ends with a whole element.

    Attributes:
        offset: what is added to a code, 8 for signed integers.
    """

    offset: int

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Quantise values, and pack their codes."""
        each = BITS[self.dtype] // 4
        columns, stride = self.quantizer.grid.matrix[1], self.shape[-1] * each
        made = np.zeros(len(buffer) * 2, np.uint8)
        begin, end = start * each, start * each + len(made)
        for row in range(begin // stride, (end - 1) // stride + 1):
            low = max(begin - row * stride, 0)
            high = min(end - row * stride, columns)
            if stride == columns:  # no row ends before its last word
                for at in range(begin, end, _AT_ONCE):
                    codes, _ = self.quantizer.codes(files, at, min(_AT_ONCE, end - at))
                    made[at - begin :][: len(codes)] = codes + np.uint8(self.offset)
                break
            if low < high:
                codes, _ = self.quantizer.codes(files, row * columns + low, high - low)
                at = row * stride + low - begin
                made[at : at + high - low] = codes + np.uint8(self.offset)
        made &= np.uint8(15)
        np.frombuffer(buffer, np.uint8)[:] = made[0::2] | (made[1::2] << np.uint8(4))


@dataclass(frozen=True, slots=True)
class NewScales(_Part):
    """The scales of blocks, in row-major order."""

    @property
    def times(self) -> int:
        """Once, if every block is in one row."""
        return int(self.quantizer.grid.block[0] == 1)

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Choose scales."""
        size, columns = BITS[self.dtype] // 8, self.quantizer.grid.columns
        count = len(buffer) // size
        first, last = start // columns, (start + count - 1) // columns
        stored = self.quantizer.scales(files, first, last).stored
        assert stored.itemsize == size, f"{self.name} is {self.dtype}, not {stored.dtype}"
        data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        at = (start - first * columns) * size
        np.frombuffer(buffer, np.uint8)[:] = data[at : at + len(buffer)]


@dataclass(frozen=True, slots=True)
class NewShared(_Part):
    """The scale of a whole tensor."""

    @property
    def times(self) -> int:
        """Never: it is known."""
        return 0

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Find the largest value."""
        del start
        np.frombuffer(buffer, np.float32)[:] = self.quantizer.shared_scale(files)


@dataclass(frozen=True, slots=True)
class NewZeros(_Part):
    """The zero points of blocks: an int8 each, or eight rows to an int32."""

    @property
    def times(self) -> int:
        """Once, if every block is in one row."""
        return int(self.quantizer.grid.block[0] == 1)

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Choose zero points."""
        columns = self.quantizer.grid.columns
        size = BITS[self.dtype] // 8
        count = len(buffer) // size
        first, last = start // columns, (start + count - 1) // columns
        if size == 1:
            points = self.quantizer.scales(files, first, last).zeros.astype(np.int8)
            data = points.reshape(-1).view(np.uint8)
        else:
            rows = self.quantizer.grid.rows
            stop = min(last * 8 + 8, rows)
            zeros = self.quantizer.scales(files, first * 8, stop - 1).zeros
            padded = np.zeros(((last + 1 - first) * 8, columns), np.uint32)
            padded[: stop - first * 8] = (zeros + np.float32(8)).astype(np.uint32)
            shifts = np.arange(8, dtype=np.uint32)[None, :, None] * np.uint32(4)
            words = (padded.reshape(-1, 8, columns) << shifts).sum(axis=1, dtype=np.uint32)
            data = words.reshape(-1).view(np.uint8)
        at = (start - first * columns) * size
        np.frombuffer(buffer, np.uint8)[:] = data[at : at + len(buffer)]


@dataclass(frozen=True, slots=True)
class NewValues(_Part):
    """The values that the codes and scales stand for, in float32: what a reader will see.

    Attributes:
        table: the value of each 4-bit code; empty for other codes.
    """

    table: tuple[float, ...]

    @property
    def times(self) -> int:
        """Once for codes, and once each for the extremes of blocks and of the tensor."""
        quantizer = self.quantizer
        return 1 + (quantizer.grid.block[0] > 1) + quantizer.shared

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Quantise values, and decode them again."""
        from diffxfer.kernels.native import kernel

        quantizer, count = self.quantizer, len(buffer) // 4
        grid = quantizer.grid
        codes, chosen = quantizer.codes(files, start, count)
        columns = grid.matrix[1]
        layout = grid.matrix[0], *grid.block, grid.rows, grid.columns, grid.row(start // columns)
        scales, zeros = np.ascontiguousarray(chosen.scales), np.ascontiguousarray(chosen.zeros)
        if quantizer.recipe.kind == 2:
            decode = kernel("decode_int8", ("U8", "F32", "F32", "F32"))
            arrays = addresses(codes, scales, zeros, buffer)
        elif quantizer.recipe.kind > 2:
            flat = np.array(self.table, np.float32)[codes]
            np.frombuffer(buffer, np.float32)[:] = flat
            return self._scale(buffer, start, scales, layout)
        else:
            decode = kernel("decode_e4m3", ("U8", "F32", "F32"))
            arrays = addresses(codes, scales, buffer)
        decode(*arrays, start, count, columns, *layout)
        return None

    def _scale(
        self, buffer: memoryview, start: int, scales: Floats, layout: tuple[int, ...]
    ) -> None:
        """Multiply decoded 4-bit values by the scales of their groups, which are in one row."""
        values = np.frombuffer(buffer, np.float32)
        columns, width = self.quantizer.grid.matrix[1], layout[2]
        places = np.arange(start, start + len(values))
        rows, inside = places // columns, places % columns
        np.multiply(values, scales[rows - rows[0], inside // width], out=values)


@dataclass(frozen=True, slots=True)
class ExactValues(_Part):
    """The values before they are quantised: cheap if `NewValues` has just been read there."""

    @property
    def times(self) -> int:
        """Never: `NewValues` has just computed them."""
        return 0

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Copy values, or compute them."""
        made = np.frombuffer(buffer, np.float32)
        for done in range(0, len(made), _AT_ONCE):
            part = made[done : done + _AT_ONCE]
            part[:] = self.quantizer.exact(files, start + done, len(part))


@dataclass(frozen=True, slots=True)
class NewTransposedBlocks(_Part):
    """The codes of gpt-oss: those of the transposed matrices, in groups of 32.

    The quantizer's values are the transposed ones, so a group is consecutive.
    """

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Quantise values, and pack their codes."""
        codes, _ = self.quantizer.codes(files, start * 2, len(buffer) * 2)
        np.frombuffer(buffer, np.uint8)[:] = codes[0::2] | (codes[1::2] << np.uint8(4))


@dataclass(frozen=True, slots=True)
class Transposed(StoredTensor):
    """Matrices whose rows and columns are exchanged, in float32.

    Attributes:
        values: the matrices, of the shape (matrices, rows, columns), in float32.
    """

    values: StoredTensor

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The parts of the values."""
        return self.values.parts

    @property
    def parameters(self) -> tuple[object, ...]:
        """What the values depend on."""
        return self.values.parameters

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Read the columns that the elements are in, as strips of all rows."""
        _, rows, columns = self.values.shape
        count, done = len(buffer) // 4, 0
        made = np.frombuffer(buffer, np.float32)
        while done < count:
            matrix, inside = divmod(start + done, rows * columns)
            some = min(rows * columns - inside, count - done)
            first, last = inside // rows, (inside + some - 1) // rows
            strip = self._strip(files, matrix, first, last + 1)
            at = inside - first * rows
            made[done : done + some] = strip.reshape(-1)[at : at + some]
            done += some

    def _strip(self, files: Files, matrix: int, first: int, stop: int) -> Floats:
        """Columns of a matrix, one after the other: (columns, rows)."""
        _, rows, columns = self.values.shape
        size = rows * columns * 4
        found = files.shared.of(self, matrix, size, lambda: _Whole(rows, columns))

        def fill(part: int) -> None:
            values = found.values[part * found.step : (part + 1) * found.step]
            at = (matrix * rows + part * found.step) * columns
            self.values.read(files, at, values.data.cast("B"))

        found.together.finish(fill)
        return np.ascontiguousarray(found.values[:, first:stop].T)


class _Whole:
    """A matrix that threads compute together, to read its columns.

    Args:
        rows: its rows.
        columns: its columns.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.values = np.empty((rows, columns), np.float32)
        self.step = max(_AT_ONCE // max(columns, 1), 1)
        self.together = Together(-(-rows // self.step))
