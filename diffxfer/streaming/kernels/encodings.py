"""How an element of each dtype is read and written. Imported by numba's compiler alone.

A kernel sees elements as numba's types: `uint16` is a bfloat16, `int16` a float16, `float32` and
`float64` are themselves. A new encoding is one more type, reader and writer here.

float64 becomes a 16-bit type by way of float32, as in PyTorch. Conversions of 16-bit types work on
integers, so that no processor needs instructions for them, and none of their steps has a subnormal
operand or result. NaN stays NaN: float16 keeps its sign and the upper bits of its payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

if TYPE_CHECKING:
    from collections.abc import Callable

TYPES = {
    "BF16": types.uint16,
    "F16": types.int16,
    "F32": types.float32,
    "F64": types.float64,
    "U8": types.uint8,
}
"""What stands for a dtype."""

_INTEGERS = {types.float32: types.uint32, types.float64: types.uint64}


def read(element: Any) -> Any:
    """The value of an element, in float64."""
    raise NotImplementedError


def write(value: Any, like: Any) -> Any:
    """The element that a float64 is rounded to, of the type of another element."""
    raise NotImplementedError


def bits(element: Any) -> Any:
    """The bits of an element, as an unsigned integer."""
    raise NotImplementedError


def not_finite(element: Any) -> Any:
    """Whether an element is NaN or infinite: 1 or 0."""
    raise NotImplementedError


def same(left: Any, right: Any, difference: Any) -> Any:
    """Whether two elements are the same: in every bit, or by value in unlike dtypes."""
    raise NotImplementedError


@intrinsic
def _as_float(context: Any, value: Any) -> Any:  # noqa: ARG001 numba's signature
    return types.float32(types.uint32), lambda _, b, __, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def _as_integer(context: Any, value: Any) -> Any:  # noqa: ARG001 numba's signature
    made = _INTEGERS[value]
    return made(value), lambda _, b, __, a: b.bitcast(a[0], ir.IntType(made.bitwidth))


@overload(read, strict=False)
def _read(element: Any) -> Callable[..., Any]:
    if element == types.uint16:
        return lambda element: np.float64(_as_float(np.uint32(element) << np.uint32(16)))
    if element == types.int16:
        return _read_half
    return lambda element: np.float64(element)


def _read_half(element: Any) -> Any:
    half = np.uint32(np.uint16(element))
    magnitude = half & np.uint32(0x7FFF)
    if magnitude < np.uint32(0x0400):  # subnormal: a number of steps of 2⁻²⁴
        value = np.float32(np.int32(magnitude)) * np.float32(2.0**-24)
    elif magnitude < np.uint32(0x7C00):  # the exponent's bias is 15 here, and 127 in float32
        value = _as_float((magnitude << np.uint32(13)) + np.uint32(112 << 23))
    else:
        value = _as_float((magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    return np.float64(_as_float(_as_integer(value) | sign))


@overload(write, strict=False)
def _write(value: Any, like: Any) -> Callable[..., Any]:  # noqa: ARG001 numba's signature
    if like == types.uint16:
        return _write_bfloat16
    if like == types.int16:
        return _write_half
    if like == types.float32:
        return lambda value, like: np.float32(value)  # noqa: ARG005 numba's signature
    return lambda value, like: value  # noqa: ARG005 numba's signature


def _write_bfloat16(value: Any, like: Any) -> Any:  # noqa: ARG001 numba's signature
    single = np.float32(value)
    whole = _as_integer(single)
    odd = (whole >> np.uint32(16)) & np.uint32(1)  # a tie goes to the even one
    rounded = (whole + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint16(0x7FC0) if single != single else np.uint16(rounded)


def _write_half(value: Any, like: Any) -> Any:  # noqa: ARG001 numba's signature
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


@overload(not_finite, strict=False)
def _not_finite(element: Any) -> Callable[..., Any]:
    if element == types.float32:
        infinity, all_but_sign = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
    elif element == types.float64:
        infinity, all_but_sign = np.uint64(0x7FF << 52), np.uint64((1 << 63) - 1)
    else:
        infinity = np.uint16(0x7F80 if element == types.uint16 else 0x7C00)
        all_but_sign = np.uint16(0x7FFF)
    return lambda element: np.uint32((bits(element) & all_but_sign) >= infinity)


@overload(same, strict=False)
def _same(left: Any, right: Any, difference: Any) -> Callable[..., Any]:  # noqa: ARG001 numba's
    if left == right:
        return lambda left, right, difference: bits(left) == bits(right)  # noqa: ARG005 numba's
    return lambda left, right, difference: difference == 0.0  # noqa: ARG005 numba's
