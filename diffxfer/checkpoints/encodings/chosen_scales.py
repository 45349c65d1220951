"""New scales for values that are quantised, chosen as each format's reference chooses them.

`transformers.integrations.finegrained_fp8.Fp8Quantize` for fp8 with ``weight_scale_inv``;
`compressed_tensors.quantization.utils.calculate_qparams`, `generate_gparam` and
`generate_mx_scales` for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffxfer.checkpoints.encodings.scales import scales_in_float32

if TYPE_CHECKING:
    from collections.abc import Callable

    Floats = npt.NDArray[np.float32]
    Choose = Callable[[Floats, Floats, np.float32], "Chosen"]

EXPONENTS = ("U8", "F8_E8M0")
"""The dtypes of scales that are exponents of 2."""
_F8_MAX, _F4_MAX = np.float32(448.0), np.float32(6.0)
_LARGEST_FACTOR = np.float32(2.0**126)
"""Its inverse is the least float32 that is not subnormal."""
_EPSILON = {"F32": np.float32(2.0**-23), "BF16": np.float32(2.0**-7), "F16": np.float32(2.0**-10)}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Scales and zero points of some blocks.

    Attributes:
        stored: the scales as they are written, one element each in their dtype.
        scales: by what a code is multiplied.
        factors: by what a value is multiplied or divided to be quantised; see `Recipe.kind`.
        zeros: the zero points.
    """

    stored: npt.NDArray[np.generic]
    scales: Floats
    factors: Floats
    zeros: Floats


@dataclass(frozen=True, slots=True)
class Recipe:
    """How scales are chosen, and values quantised.

    Attributes:
        kind: of the kernel `encode`: 0 multiplies, the others divide by the factors.
        low: the least integer code.
        high: the largest integer code.
        choose: from the least and largest value of each block, and the scale that all blocks of a
            tensor share, which is 1 if there is none.
    """

    kind: int
    low: int
    high: int
    choose: Choose


def reciprocal(dtype: str) -> Choose:
    """Scales of fp8 as transformers chooses them: the inverse of 448 / the largest.

    Args:
        dtype: in which scales are stored. transformers stores float32. Where it stores fewer bits,
            it divides by what it has stored, and so does this.
    """

    def choose(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
        del shared
        factors, inverse = _inverse(mins, maxs)
        if dtype == "F32":
            return Chosen(inverse, inverse, factors, np.zeros_like(inverse))
        stored, scales = _rounded(inverse, dtype)
        factors = (np.float32(1) / scales).astype(np.float32)
        return Chosen(stored, scales, factors, np.zeros_like(scales))

    return choose


def _inverse(mins: Floats, maxs: Floats) -> tuple[Floats, Floats]:
    """448 / the largest, and its inverse; 1 for a block of zeros."""
    most = np.maximum(np.abs(mins), np.abs(maxs))
    one = np.float32(1)
    with np.errstate(over="ignore"):
        # torch computes 448 / x as (1 / x)·448, and rounds twice.
        factors = (one / np.where(most > 0, most, one)).astype(np.float32) * _F8_MAX
    # Where the largest is below 1.4e-36, the reference's scale is 0, and no reader accepts that.
    factors = np.where(np.isfinite(factors), factors, _LARGEST_FACTOR)
    factors = np.where(most > 0, factors, one).astype(np.float32)
    return factors, (one / factors).astype(np.float32)


def powers_of_two(dtype: str) -> Choose:
    """Scales of fp8 that are powers of 2 (``scale_fmt: ue8m0``), as transformers chooses them.

    Args:
        dtype: in which scales are stored: a float, or an exponent of a byte.
    """

    def choose(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
        del shared
        _, inverse = _inverse(mins, maxs)
        exponent: Floats = np.ceil(np.log2(np.maximum(inverse, np.finfo(np.float32).tiny)))
        scales: Floats = np.exp2(exponent).astype(np.float32)
        stored: npt.NDArray[np.generic]
        if dtype in EXPONENTS:
            stored = (exponent + 127).astype(np.uint8)
        else:
            stored, scales = _rounded(scales, dtype)
        factors = (np.float32(1) / scales).astype(np.float32)
        return Chosen(stored, scales, factors, np.zeros_like(scales))

    return choose


def symmetric(dtype: str, half_range: float) -> Choose:
    """Scales of compressed-tensors for codes on both sides of zero: the largest / half the range.

    Args:
        dtype: in which scales are stored.
        half_range: of the codes: 448 for fp8, 127.5 for int8, 7.5 for int4.
    """

    def choose(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
        del shared
        most = np.maximum(np.abs(mins), np.abs(maxs))
        stored, scales = _rounded((most / np.float32(half_range)).astype(np.float32), dtype)
        return Chosen(stored, scales, scales, np.zeros_like(scales))

    return choose


def asymmetric(dtype: str, low: int, high: int) -> Choose:
    """Scales and zero points of compressed-tensors: the range of values / the range of codes.

    Args:
        dtype: in which scales are stored.
        low: the least code.
        high: the largest code.
    """

    def choose(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
        del shared
        mins, maxs = np.minimum(mins, np.float32(0)), np.maximum(maxs, np.float32(0))
        # A range that overflows is refused once its error is measured.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            exact = ((maxs - mins) / np.float32(high - low)).astype(np.float32)
            zeros = np.float32(low) - (mins / exact).astype(np.float32)
        zeros = np.where(exact > 0, np.clip(zeros, low, high), np.float32(0))
        stored, scales = _rounded(exact, dtype)
        return Chosen(stored, scales, scales, np.rint(zeros).astype(np.float32))

    return choose


def exponents(offset: int) -> Choose:
    """Scales of the microscaling formats: powers of 2, stored as exponents with bias 127.

    Args:
        offset: the exponent of the largest code: 2 for 4-bit floats, 8 for fp8.
    """

    def choose(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
        del shared
        most = np.maximum(np.abs(mins), np.abs(maxs)).astype(np.float32)
        # Rounds up where the largest would round to the next power of 2 with one bit of mantissa.
        whole = (most.view(np.uint32) + np.uint32(1 << 21)) & np.uint32(0xFF800000)
        exponent = (whole >> np.uint32(23)).astype(np.int64) - offset
        stored = np.clip(exponent, 0, 254).astype(np.uint8)
        scales = scales_in_float32(memoryview(stored.tobytes()), "U8").reshape(stored.shape)
        return Chosen(stored, scales, scales, np.zeros_like(scales))

    return choose


def rounded_up(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
    """Scales of gpt-oss: the largest / 6, rounded up to a power of 2.

    It is the default of `triton_kernels.numerics_details.mxfp.downcast_to_mxfp_torch`, which
    transformers calls. Like the newest version of that, codes are rounded to the nearest, and a tie
    to the even one; versions of 2025 rounded ties up.

    Args:
        mins: the least value of each block.
        maxs: the largest value of each block.
        shared: not used.
    """
    del shared
    scales = (np.maximum(np.abs(mins), np.abs(maxs)) / _F4_MAX).astype(np.float32)
    stored = ((scales.view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23)).astype(np.uint8)
    powers = scales_in_float32(memoryview(stored.tobytes()), "U8").reshape(stored.shape)
    return Chosen(stored, powers, powers, np.zeros_like(powers))


def of_shared(mins: Floats, maxs: Floats, shared: np.float32) -> Chosen:
    """Scales of NVFP4: in float8 E4M3, after multiplication by the tensor's own scale.

    Args:
        mins: the least value of each block.
        maxs: the largest value of each block.
        shared: the tensor's own scale.
    """
    most = np.maximum(np.abs(mins), np.abs(maxs))
    scales = (shared * (most / _F4_MAX).astype(np.float32)).astype(np.float32)
    stored = to_e4m3(scales)
    stored = np.where(stored == 0, to_e4m3(np.full(1, 0.125, np.float32)), stored)
    local = scales_in_float32(memoryview(stored.tobytes()), "F8_E4M3").reshape(stored.shape)
    factors = (local / shared).astype(np.float32)
    return Chosen(stored, factors, factors, np.zeros_like(factors))


def shared_scale(most: float) -> np.float32:
    """The scale of a whole tensor in NVFP4, by which its blocks' scales are divided.

    Args:
        most: the largest magnitude in the tensor.
    """
    largest = np.float32(max(most, float(np.finfo(np.float32).tiny)))
    with np.errstate(over="ignore"):
        found = np.float32(_F8_MAX * _F4_MAX) / largest
    return np.float32(found) if np.isfinite(found) else np.float32(1)


def _rounded(scales: Floats, dtype: str) -> tuple[npt.NDArray[np.generic], Floats]:
    """Scales in their dtype and the same in float32; none is zero."""
    if dtype == "F32":
        stored: npt.NDArray[np.generic] = scales
    elif dtype == "F16":
        with np.errstate(over="ignore"):  # infinity is refused once its error is measured
            stored = scales.astype(np.float16)
    else:
        whole = scales.view(np.uint32)
        odd = (whole >> np.uint32(16)) & np.uint32(1)
        stored = ((whole + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    back = scales_in_float32(memoryview(stored.tobytes()), dtype).reshape(scales.shape)
    if (back == 0).any():
        smallest = np.where(back == 0, _EPSILON[dtype], back).astype(np.float32)
        return _rounded(smallest, dtype)
    return stored, back


def to_e4m3(values: Floats) -> npt.NDArray[np.uint8]:
    """Round to float8 E4M3, for a few values.

    Args:
        values: in float32.
    """
    from diffxfer.checkpoints.encodings.scaled_codes import addresses
    from diffxfer.kernels.native import kernel

    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    codes = np.empty(len(flat), np.uint8)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    place = 0, len(flat), len(flat), 1, 1, len(flat), 1, 1, 0
    kernel("encode", ("F32", "F32", "F32", "U8"))(
        *addresses(flat, one, zero, codes), 1, 0, 0, *place
    )
    return codes.reshape(np.shape(values))
