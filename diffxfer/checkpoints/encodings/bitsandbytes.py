"""The formats of bitsandbytes: nf4 and fp4, also with double quantisation, and int8.

See https://github.com/bitsandbytes-foundation/bitsandbytes, `functional.QuantState` and
`int8_vectorwise_dequant`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from diffxfer.checkpoints.encodings.encoding import Encoding
from diffxfer.checkpoints.encodings.scaled_codes import ScaledCodes, addresses
from diffxfer.checkpoints.encodings.scales import checked_scales, grid_of
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.stored import StoredTensor
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.checkpoints.encodings.scales import Floats
    from diffxfer.checkpoints.stored import Files, TensorSpec

    Tensors = Mapping[str, TensorSpec]

FORMAT = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
METHODS = ("bitsandbytes",)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
_TABLES = {"nf4": _NF4, "fp4": (*_FP4, *(-value for value in _FP4))}
"""The values of the codes; the files have them too, rounded."""
_MAX_STATE, _MAX_DIMENSIONS = 1 << 16, 64
_TO_INT8 = 7.874015718698502e-3
"""1/127, as bitsandbytes writes it."""
_AGAIN = "download or save it again"
_SAVE = "save it again with bitsandbytes 0.45 or newer"
_CODES, _ABSMAX, _MAP, _NESTED, _NESTED_MAP, _LAYOUT = range(6)


@dataclass(frozen=True, slots=True)
class Double:
    """The quantisation of the scales of 4-bit blocks.

    Attributes:
        absmax: a scale for each block of scales.
        values: the value of each of the 256 codes of a scale.
        block: the number of scales in a block.
        offset: what is added to each scale.
    """

    absmax: TensorSpec
    values: TensorSpec
    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class FourBits(StoredTensor):
    """Values in float32: the value of a 4-bit code times the scale of its block.

    Attributes:
        codes: the codes, two to a byte, the upper half first.
        absmax: a scale for each block of consecutive values, in float32, or as codes.
        values: the value of each of the 16 codes.
        state: the description that shape and block size are from.
        kind: ``"nf4"`` or ``"fp4"``.
        block: the number of values in a block.
        double: how the scales are quantised; None if they are not.
    """

    codes: TensorSpec
    absmax: TensorSpec
    values: TensorSpec
    state: TensorSpec
    kind: str
    block: int
    double: Double | None

    @property
    def written_dtype(self) -> str:
        """bfloat16: its range is that of the decoded float32."""
        return "BF16"

    @property
    def encoding(self) -> str:
        """The kind of number, and the block size."""
        double = "" if self.double is None else ", scales quantised too"
        return f"{self.kind}, blocks of {self.block}{double}"

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The codes, their scales, and the description."""
        nested = () if self.double is None else (self.double.absmax, self.double.values)
        return self.codes, self.absmax, self.values, self.state, *nested

    @property
    def parameters(self) -> tuple[object, ...]:
        """The block sizes and the offset."""
        nested = () if self.double is None else (self.double.block, self.double.offset)
        return self.block, *nested

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements.

        Raises:
            CheckpointError: if the values of the codes or a scale are invalid, or a part cannot be
                read.
        """
        import numpy as np

        from diffxfer.kernels.native import kernel

        count, block = len(buffer) // 4, self.block
        first, last = start // block, (start + count - 1) // block
        begin, end = start // 2, (start + count - 1) // 2 + 1
        codes = files.read(self.codes, begin, end - begin, _CODES)
        table = self._table(files)
        scales = self._scales(files, first, last + 1 - first)
        zeros = np.zeros_like(scales)
        decode = kernel("decode_nibbles", ("U8", "F32", "F32", "F32", "F32"))
        decode(
            *addresses(codes, table, scales, zeros, buffer),
            # One row for each block.
            *(start, count, block, block, begin * 2, 1),
            *(self.elements // block + 1, 1, block, self.elements // block + 1, 1, first),
        )

    def _table(self, files: Files) -> Floats:
        """The values of the codes, as the file has them: bitsandbytes uses those of the kind."""
        import numpy as np

        table = np.frombuffer(files.read(self.values, 0, 16, _MAP), "<f4")
        with np.errstate(all="ignore"):
            furthest = np.abs(table - np.array(_TABLES[self.kind], np.float32)).max()
        if not furthest < 1e-4:  # nor if it is NaN
            problem = f"{self.values.name} does not contain the 16 values of {self.kind}"
            raise CheckpointError(self.values.shard.path, problem, _AGAIN)
        return table

    def _scales(self, files: Files, first: int, count: int) -> Floats:
        import numpy as np

        if self.double is None:
            data = files.read(self.absmax, first, count, _ABSMAX)
            return checked_scales(data, self.absmax, first, zero=True)
        double = self.double
        codes = np.frombuffer(files.read(self.absmax, first, count, _ABSMAX), np.uint8)
        values = np.frombuffer(files.read(double.values, 0, 256, _NESTED_MAP), "<f4")
        begin, end = first // double.block, (first + count - 1) // double.block + 1
        data = files.read(double.absmax, begin, end - begin, _NESTED)
        outer = checked_scales(data, double.absmax, begin, zero=True)
        places = np.arange(first, first + count) // double.block - begin
        with np.errstate(all="ignore"):  # what is not finite is refused
            scales = values[codes] * outer[places] + np.float32(double.offset)
        if not np.isfinite(scales).all():
            problem = f"{self.absmax.name} has a scale that is not finite"
            raise CheckpointError(self.absmax.shard.path, problem, _AGAIN)
        return np.ascontiguousarray(scales, np.float32)


@dataclass(frozen=True, slots=True)
class EightBits(ScaledCodes):
    """Values in float32: int8 codes times the scale of their row, divided by 127.

    Attributes:
        layout: a number that says how the codes are ordered, 0 for row by row; None if it is not
            stored, since there is no other order in newer versions.
    """

    layout: TensorSpec | None = None

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The codes, their scales and the order."""
        return self.codes, *self.grid.parts, *(() if self.layout is None else (self.layout,))

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements.

        Raises:
            CheckpointError: if the codes are not stored row by row, a scale is invalid, or a part
                cannot be read.
        """
        import numpy as np

        if self.layout is not None and bytes(files.read(self.layout, 0, 1, _LAYOUT)) != b"\0":
            problem = f"{self.layout.name} says that the codes are not stored row by row"
            raise CheckpointError(self.layout.shard.path, problem, _SAVE)
        ScaledCodes.read(self, files, start, buffer)
        made = np.frombuffer(buffer, "<f4")
        np.multiply(made, np.float32(_TO_INT8), out=made)


def find(config: Mapping[str, Any], tensors: Tensors) -> Iterator[StoredTensor]:
    """Find the weights that bitsandbytes has quantised.

    Raises:
        CheckpointError: if a weight lacks a part, or a part has a wrong shape or dtype.
    """
    del config
    files = one_at_a_time()
    for name, spec in tensors.items():
        base, found, kind = name.partition(_STATE)
        if found:
            if kind not in _TABLES:
                problem = f"{name} is of the kind {kind}, expected {' or '.join(_TABLES)}"
                raise CheckpointError(spec.shard.path, problem, _AGAIN)
            yield _four_bits(base, kind, spec, tensors, files)
        elif name.endswith(".SCB"):
            yield from _eight_bits(name.removesuffix("SCB") + "weight", spec, tensors)


def _eight_bits(name: str, scale: TensorSpec, tensors: Tensors) -> Iterator[StoredTensor]:
    codes = tensors.get(name)
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
        found = "missing" if codes is None else f"{codes.dtype} {codes.shape}"
        problem = f"{scale.name} has no weight: {name} is {found}, expected an I8 matrix"
        raise CheckpointError(scale.shard.path, problem, _AGAIN)
    if (scale.dtype, scale.elements) != ("F32", codes.shape[0]):
        problem = f"{scale.name} is {scale.dtype} {scale.shape}, expected F32 ({codes.shape[0]},)"
        raise CheckpointError(scale.shard.path, problem, _AGAIN)
    layout = tensors.get(name + "_format")
    if layout is not None and (layout.dtype, layout.elements) != ("U8", 1):
        problem = f"{layout.name} is {layout.dtype} {layout.shape}, expected one U8"
        raise CheckpointError(layout.shard.path, problem, _AGAIN)
    grid = replace(grid_of(codes, codes.shape, scale, None), zero_scale=True)
    made = name, "F32", codes.shape, codes.shard
    yield EightBits(*made, codes, grid, layout=layout)


def _four_bits(name: str, kind: str, state: TensorSpec, tensors: Tensors, files: Files) -> FourBits:
    codes = _part(name, ("U8",), state, tensors)
    told = _read_state(state, files)
    shape, block = told["shape"], told["blocksize"]
    count = math.prod(shape)
    if codes.elements != (count + 1) // 2:
        problem = f"{name} has {codes.elements * 2} codes, expected {count} for {tuple(shape)}"
        raise CheckpointError(codes.shard.path, problem, _AGAIN)
    blocks = -(-count // block)
    double, dtype = None, "F32"
    if f"{name}.nested_absmax" in tensors:
        dtype = "U8"
        size = told.get("nested_blocksize")
        offset = told.get("nested_offset")
        if not _is_size(size) or not size or not _is_number(offset):
            problem = f"{state.name} states no valid nested_blocksize and nested_offset"
            raise CheckpointError(state.shard.path, problem, _AGAIN)
        outer = _part(f"{name}.nested_absmax", ("F32",), state, tensors, -(-blocks // size))
        values = _part(f"{name}.nested_quant_map", ("F32",), state, tensors, 256)
        double = Double(outer, values, size, float(offset))
    absmax = _part(f"{name}.absmax", (dtype,), state, tensors, blocks)
    values = _part(f"{name}.quant_map", ("F32",), state, tensors, 16)
    made = name, "F32", tuple(shape), codes.shard
    return FourBits(*made, codes, absmax, values, state, kind, block, double)


def _part(
    name: str, dtypes: tuple[str, ...], state: TensorSpec, tensors: Tensors, size: int | None = None
) -> TensorSpec:
    part = tensors.get(name)
    if part is None:
        problem = f"{state.name} belongs to {name}, which is missing"
        raise CheckpointError(state.shard.path, problem, _AGAIN)
    if part.dtype not in dtypes or size not in (None, part.elements):
        expected = f"{' or '.join(dtypes)}{'' if size is None else f' ({size},)'}"
        problem = f"{name} is {part.dtype} {part.shape}, expected {expected}"
        raise CheckpointError(part.shard.path, problem, _AGAIN)
    return part


def _read_state(state: TensorSpec, files: Files) -> dict[str, Any]:
    """Read the JSON that a U8 tensor contains."""
    told: Any = None
    if state.dtype == "U8" and state.elements <= _MAX_STATE:
        data = bytes(files.read(state, 0, state.elements))
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            told = None
    shape = told.get("shape") if isinstance(told, dict) else None
    block = told.get("blocksize") if isinstance(told, dict) else None
    sizes = shape if isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS else [None]
    if not all(map(_is_size, (*sizes, block))) or not block:
        problem = f"{state.name} is no JSON object with shape and blocksize"
        raise CheckpointError(state.shard.path, problem, _AGAIN)
    found: dict[str, Any] = told
    return found


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 48


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite float32."""
    return isinstance(value, int | float) and abs(value) < 1e38


ENCODING = Encoding(FORMAT, find, METHODS)
