"""The formats of bitsandbytes: nf4 and fp4, also with double quantisation, and int8.

See https://github.com/bitsandbytes-foundation/bitsandbytes, `functional.QuantState` and
`int8_vectorwise_dequant`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
_KINDS = ("nf4", "fp4")
_MAX_STATE = 1 << 16
_TO_INT8 = np.float32(7.874015718698502e-3)
"""1/127, as bitsandbytes writes it."""
_AGAIN = "download or save it again"
_CODES, _ABSMAX, _MAP, _NESTED, _NESTED_MAP = range(5)


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
        block: the number of values in a block.
        double: how the scales are quantised; None if they are not.
    """

    codes: TensorSpec
    absmax: TensorSpec
    values: TensorSpec
    state: TensorSpec
    block: int
    double: Double | None

    @property
    def written_dtype(self) -> str:
        """bfloat16: its range is that of the decoded float32."""
        return "BF16"

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
        """Decode elements."""
        from diffxfer.kernels.native import kernel

        count, block = len(buffer) // 4, self.block
        first, last = start // block, (start + count - 1) // block
        begin, end = start // 2, (start + count - 1) // 2 + 1
        codes = files.read(self.codes, begin, end - begin, _CODES)
        table = np.frombuffer(files.read(self.values, 0, 16, _MAP), "<f4")
        scales = self._scales(files, first, last + 1 - first)
        zeros = np.zeros_like(scales)
        decode = kernel("decode_nibbles", ("U8", "F32", "F32", "F32", "F32"))
        decode(
            *addresses(codes, table, scales, zeros, buffer),
            # One row for each block.
            *(start, count, block, block, begin * 2, 1),
            *(self.elements // block + 1, 1, block, self.elements // block + 1, 1, first),
        )

    def _scales(self, files: Files, first: int, count: int) -> Floats:
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
        scales = values[codes] * outer[places] + np.float32(double.offset)
        if not np.isfinite(scales).all():
            problem = f"{self.absmax.name} has a scale that is not finite"
            raise CheckpointError(self.absmax.shard.path, problem, _AGAIN)
        return np.ascontiguousarray(scales, np.float32)


@dataclass(frozen=True, slots=True)
class EightBits(ScaledCodes):
    """Values in float32: int8 codes times the scale of their row, divided by 127."""

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements."""
        ScaledCodes.read(self, files, start, buffer)
        made = np.frombuffer(buffer, "<f4")
        np.multiply(made, _TO_INT8, out=made)


def find(config: Mapping[str, Any], tensors: Tensors) -> Iterator[StoredTensor]:
    """Find the weights that bitsandbytes has quantised.

    Raises:
        CheckpointError: if a weight lacks a part, or a part has a wrong shape or dtype.
    """
    del config
    for name, spec in tensors.items():
        base, found, kind = name.partition(_STATE)
        if found:
            if kind not in _KINDS:
                problem = f"{name} is of the kind {kind}, expected {' or '.join(_KINDS)}"
                raise CheckpointError(spec.shard.path, problem, _AGAIN)
            yield _four_bits(base, spec, tensors)
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
    grid = grid_of(codes, codes.shape, scale, None)
    yield EightBits(name, "F32", codes.shape, codes.shard, codes, grid)


def _four_bits(name: str, state: TensorSpec, tensors: Tensors) -> FourBits:
    codes = _part(name, ("U8",), state, tensors)
    told = _read_state(state)
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
        if not isinstance(size, int) or size < 1 or not isinstance(offset, int | float):
            problem = f"{state.name} lacks nested_blocksize or nested_offset"
            raise CheckpointError(state.shard.path, problem, _AGAIN)
        outer = _part(f"{name}.nested_absmax", ("F32",), state, tensors, -(-blocks // size))
        values = _part(f"{name}.nested_quant_map", ("F32",), state, tensors, 256)
        double = Double(outer, values, size, float(offset))
    absmax = _part(f"{name}.absmax", (dtype,), state, tensors, blocks)
    values = _part(f"{name}.quant_map", ("F32",), state, tensors, 16)
    made = name, "F32", tuple(shape), codes.shard
    return FourBits(*made, codes, absmax, values, state, block, double)


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


def _read_state(state: TensorSpec) -> dict[str, Any]:
    """Read the JSON that a U8 tensor contains."""
    told: Any = None
    if state.dtype == "U8" and state.elements <= _MAX_STATE:
        data = bytes(one_at_a_time().read(state, 0, state.elements))
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            told = None
    shape = told.get("shape") if isinstance(told, dict) else None
    block = told.get("blocksize") if isinstance(told, dict) else None
    sizes = shape if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in (*sizes, block)) or not block:
        problem = f"{state.name} is no JSON object with shape and blocksize"
        raise CheckpointError(state.shard.path, problem, _AGAIN)
    found: dict[str, Any] = told
    return found


ENCODING = Encoding(FORMAT, find)
