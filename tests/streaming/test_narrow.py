"""The arithmetic with fewer passes gives the bits of the one in float64, wherever it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffxfer.streaming import narrow, ops

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
EVERY = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
"""Every pattern of 16 bits: all numbers, both zeros, subnormals, infinities and NaN."""


def any_bits(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(BITS[dtype])
    drawn = torch.randint(limits.min, limits.max, (count,), generator=generator)
    return drawn.to(BITS[dtype]).view(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit; NaN is NaN, whatever its payload."""
    bits = BITS[found.dtype]
    both = found.isnan() & expected.isnan()
    return bool(((found.view(bits) == expected.view(bits)) | both).all())


def in_float64(inputs: list[Tensor], out: torch.dtype) -> Tensor:
    *delta, target = inputs
    one, other = (torch.empty(len(target), dtype=torch.float64) for _ in range(2))
    if len(delta) == 2:
        ops.subtract(*delta, one, other)
    else:
        one.copy_(delta[0])
    ops.add_scaled(target, one, 1.0, other)
    return other.to(out)


@pytest.mark.parametrize("dtype", BITS)
def test_one_sum(dtype: torch.dtype) -> None:
    for seed in range(4):
        left, right = (any_bits(dtype, 1 << 18, 2 * seed + n) for n in range(2))
        if dtype.itemsize == 2 and seed < 2:
            left = EVERY.view(dtype).repeat(4)
        out = torch.empty_like(left)
        assert not narrow.add(left, right, out), "NaN and infinity are to be computed anew"
        assert same(out, in_float64([left, right], dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_sum_of_neighbours(dtype: torch.dtype) -> None:
    """Sums that cancel, and sums that lie between two numbers of the dtype."""
    for apart in range(-3000, 3000, 211):
        left = EVERY.view(dtype)
        right = (EVERY + apart).to(torch.int16).view(dtype)
        out = torch.empty_like(left)
        assert not narrow.add(left, -right, out)
        assert same(out, in_float64([left, -right], dtype))


def test_dtypes_that_are_not_proved() -> None:
    one, two = torch.ones(4), torch.ones(4, dtype=torch.bfloat16)
    for tensors in ((one, one, two), (one, two, one), (two, one, two)):
        assert not narrow.add(*tensors)
    assert not narrow.add(*(tensor.double() for tensor in (one, one, one)))
    buffers = torch.empty(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    for dtypes in ("float16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "bfloat16"):
        finetuned, base, target = (torch.ones(4, dtype=getattr(torch, name)) for name in dtypes)
        assert not narrow.transfer(finetuned, base, target, two, *buffers)
    assert not narrow.transfer(two, two, one.double(), two, *buffers)
    assert not narrow.transfer(two, two, two, one.double(), *buffers)


@pytest.mark.parametrize("target", BITS)
@pytest.mark.parametrize("out", BITS)
def test_transfer_where_exponents_are_near(target: torch.dtype, out: torch.dtype) -> None:
    apart = [*range(-2048, 2049, 512), 2047, 2048, 1, 0, 30720, 32767, -30720]
    for seed, step in enumerate(apart):
        finetuned = EVERY.view(torch.bfloat16)
        magnitudes = (EVERY.to(torch.int32) & 0x7FFF) + step
        flipped = any_bits(torch.bfloat16, len(EVERY), seed).view(torch.int16) & -0x8000
        base = ((magnitudes & 0x7FFF) | flipped.to(torch.int32)).to(torch.int16)
        # A magnitude that fell off one end came back at the other.
        wrapped = (magnitudes < 0) | (magnitudes > 0x7FFF)
        base = torch.where(wrapped, EVERY, base).view(torch.bfloat16)
        onto = any_bits(target, len(EVERY), seed + 1000)
        found = torch.zeros(len(EVERY), dtype=out)
        buffers = [torch.empty(len(EVERY), dtype=torch.float64) for _ in range(2)]
        assert not narrow.transfer(finetuned, base, onto, found, buffers[0], buffers[1])
        assert found.any(), "left before it was computed"
        fine = found.isfinite()
        expected = in_float64([finetuned, base, onto], out)
        assert same(found[fine], expected[fine])
        assert fine.sum() > len(fine) * 0.9 or out is torch.float16
        assert narrow.transfer(
            *(values[fine].clone() for values in (finetuned, base, onto, found)),
            *(buffer[: int(fine.sum())].clone() for buffer in buffers),
        )


def test_one_far_exponent_is_enough_to_leave_it() -> None:
    finetuned = torch.full((64,), 1.0, dtype=torch.bfloat16)
    buffers = torch.empty(64, dtype=torch.float64), torch.empty(64, dtype=torch.float64)
    for step in (2049, -2049, 9000, -9000):
        base = finetuned.clone()
        base.view(torch.int16)[17] += step
        out = torch.zeros(64, dtype=torch.bfloat16)
        assert not narrow.transfer(finetuned, base, finetuned, out, *buffers)
        assert not out.any()
