"""Reading and writing an element of each dtype. Imported only by numba's compiler.

In a kernel, elements have numba's types: `uint16` is a bfloat16, `int16` a float16, `float32` and
`float64` are themselves. A new dtype is one more type, reader and writer here.

float64 becomes a 16-bit dtype by way of float32, as in PyTorch, so that the bits are PyTorch's.
float16 is converted by the processor's instructions if it has them, otherwise in integers, as
bfloat16 is. The steps in integers avoid subnormal operands and results. NaN stays NaN: float16
keeps its sign and the upper bits of its payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from diffxfer.kernels.processor import converts_halves

if TYPE_CHECKING:
    from collections.abc import Callable

TYPES = {
    "BF16": types.uint16,
    "F16": types.int16,
    "F32": types.float32,
    "F64": types.float64,
    "U8": types.uint8,
    "U32": types.uint32,
    "U64": types.uint64,
}
"""The type of an element in a kernel, by dtype."""

_INTEGERS = {types.float32: types.uint32, types.float64: types.uint64}


def read(element: Any) -> Any:
    """The value of an element, in float64."""
    raise NotImplementedError


def write(value: Any, pointer: Any) -> Any:
    """A float64 rounded to the dtype of a pointer."""
    raise NotImplementedError


def bits(element: Any) -> Any:
    """The bits of an element, as an unsigned integer."""
    raise NotImplementedError


def note(found: Any, element: Any) -> Any:
    """`found`, with its first bit set if an element is NaN or infinite."""
    raise NotImplementedError


def first_bit(found: Any) -> Any:
    """1 if `note` has set the first bit, else 0."""
    raise NotImplementedError


def none(pointer: Any) -> Any:
    """The initial value of `found` for the dtype of a pointer."""
    raise NotImplementedError


def differs(left: Any, right: Any) -> Any:
    """1 if two elements of one dtype differ in any bit, else 0."""
    raise NotImplementedError


def same(left: Any, right: Any, difference: Any) -> Any:
    """1 if two elements have the same bits, or the same value if their dtypes differ; else 0."""
    raise NotImplementedError


@intrinsic
def _as_float(context: Any, value: Any) -> Any:
    return types.float32(types.uint32), lambda _, b, __, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def _as_integer(context: Any, value: Any) -> Any:
    made = _INTEGERS[value]
    return made(value), lambda _, b, __, a: b.bitcast(a[0], ir.IntType(made.bitwidth))


bits_of_float = _as_integer
"""The bits of a float32, as an unsigned integer."""
float_of_bits = _as_float
"""The float32 of 32 bits."""


@intrinsic
def low_zeros(context: Any, value: Any) -> Any:
    """The number of zeros below the lowest 1 of a uint64, which is not 0."""
    nothing = ir.Constant(ir.IntType(1), 1)
    return types.uint64(types.uint64), lambda _, b, __, a: b.cttz(a[0], nothing)


@intrinsic
def load_word(context: Any, pointer: Any, place: Any) -> Any:
    """The uint64 whose bytes begin at a place, the lowest first."""

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        loaded = builder.load(_word_at(builder, values))
        loaded.align = 1
        return loaded

    return types.uint64(pointer, types.uint64), generate


@intrinsic
def store_word(context: Any, pointer: Any, place: Any, word: Any) -> Any:
    """Write the bytes of a uint64 from a place on, the lowest first."""

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        builder.store(values[2], _word_at(builder, values)).align = 1
        return context.get_dummy_value()

    return types.void(pointer, types.uint64, types.uint64), generate


def _word_at(builder: Any, values: Any) -> Any:
    return builder.bitcast(builder.gep(values[0], [values[1]]), ir.IntType(64).as_pointer())


@intrinsic
def _half_as_float(context: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.fpext(builder.bitcast(values[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float_as_half(context: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.bitcast(builder.fptrunc(values[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@overload(read, strict=False)
def _read(element: Any) -> Callable[..., Any]:
    if element == types.uint16:
        return lambda element: np.float64(_as_float(np.uint32(element) << np.uint32(16)))
    if element == types.int16:
        if converts_halves():
            return lambda element: np.float64(_half_as_float(element))
        return _read_half
    return lambda element: np.float64(element)


def _read_half(element: Any) -> Any:
    half = np.uint32(np.uint16(element))
    magnitude = half & np.uint32(0x7FFF)
    if magnitude < np.uint32(0x0400):  # subnormal: a number of steps of 2⁻²⁴
        value = np.float32(np.int32(magnitude)) * np.float32(2.0**-24)
    elif magnitude < np.uint32(0x7C00):  # the exponent's bias is 15 here, and 127 in float32
        value = _as_float((magnitude << np.uint32(13)) + np.uint32(112 << 23))
    elif magnitude == np.uint32(0x7C00):
        value = _as_float(np.uint32(0x7F800000))
    else:  # NaN, a quiet one
        value = _as_float((magnitude << np.uint32(13)) | np.uint32(0x7FC00000))
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    return np.float64(_as_float(_as_integer(value) | sign))


@overload(write, strict=False)
def _write(value: Any, pointer: Any) -> Callable[..., Any]:
    element = pointer.dtype
    if element == types.uint16:
        return _write_bfloat16
    if element == types.int16:
        if converts_halves():
            return lambda value, pointer: _float_as_half(np.float32(value))
        return _write_half
    if element == types.float32:
        return lambda value, pointer: np.float32(value)
    return lambda value, pointer: value


def _write_bfloat16(value: Any, pointer: Any) -> Any:
    single = np.float32(value)
    whole = _as_integer(single)
    odd = (whole >> np.uint32(16)) & np.uint32(1)  # a tie goes to the even one
    rounded = (whole + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint16(0x7FC0) if single != single else np.uint16(rounded)


def _write_half(value: Any, pointer: Any) -> Any:
    whole = _as_integer(np.float32(value))
    magnitude = whole & np.uint32(0x7FFFFFFF)
    if magnitude < np.uint32(0x38800000):  # below 2⁻¹⁴: the processor rounds, as 0.5 has its step
        raised = _as_float(magnitude) + np.float32(0.5)
        half = _as_integer(raised) - np.uint32(0x3F000000)
    elif magnitude < np.uint32(0x477FF000):  # below 65520, which is infinity
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = magnitude - np.uint32(112 << 23) + np.uint32(0x0FFF) + odd
        half = rounded >> np.uint32(13)
    elif magnitude <= np.uint32(0x7F800000):
        half = np.uint32(0x7C00)
    else:
        half = np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x03FF))
    sign = (whole >> np.uint32(16)) & np.uint32(0x8000)
    return np.int16(np.uint16(half | sign))


@overload(bits, strict=False)
def _bits(element: Any) -> Callable[..., Any]:
    if isinstance(element, types.Integer):
        return lambda element: np.uint16(element)
    return lambda element: _as_integer(element)


@overload(note, strict=False)
def _note(found: Any, element: Any) -> Callable[..., Any]:
    # Without its sign, plus one in the exponent: from infinity on, that carries into the sign.
    if element == types.float32:
        return lambda found, element: np.uint32(
            found | ((bits(element) & np.uint32(0x7FFFFFFF)) + np.uint32(0x00800000))
        )
    if element == types.float64:
        return lambda found, element: np.uint64(
            found | ((bits(element) & np.uint64((1 << 63) - 1)) + np.uint64(1 << 52))
        )
    step = np.uint16(0x0080 if element == types.uint16 else 0x0400)
    return lambda found, element: np.uint16(found | ((bits(element) & np.uint16(0x7FFF)) + step))


@overload(first_bit, strict=False)
def _first_bit(found: Any) -> Callable[..., Any]:
    places = found.bitwidth - 1
    return lambda found: np.int64(np.uint64(found) >> np.uint64(places))


@overload(same, strict=False)
def _same(left: Any, right: Any, difference: Any) -> Callable[..., Any]:
    if left == right:
        return lambda left, right, difference: np.uint32(bits(left) == bits(right))
    return lambda left, right, difference: np.uint32(difference == 0.0)


@overload(differs, strict=False)
def _differs(left: Any, right: Any) -> Callable[..., Any]:
    return lambda left, right: np.uint32(bits(left) != bits(right))


@overload(none, strict=False)
def _none(pointer: Any) -> Callable[..., Any]:
    made = _INTEGERS.get(pointer.dtype, types.uint16)
    if made == types.uint16:
        return lambda pointer: np.uint16(0)
    if made == types.uint32:
        return lambda pointer: np.uint32(0)
    return lambda pointer: np.uint64(0)
