"""Every kernel against PyTorch's float64, bit for bit."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from diffxfer.kernels.native import kernel
from tests.helpers import DTYPES, to_bits, values
from tests.kernels.arithmetic import (
    EVERY,
    any_bits,
    apply,
    call,
    call_with_sums,
    finite,
    same,
    transfer,
)

ALPHAS = [1.0, 0.35, -1.3, 0.1, 1e-300, -0.0, 3.0]
HALVES = [torch.bfloat16, torch.float16]
COUNT = 70_001


def some_of(count: int) -> list[object]:
    """Mixes of dtypes: the plain ones and a sample; the others are slow, as each is compiled."""
    found: list[object] = []
    step = {2: 3, 3: 11, 4: 61}[count]
    for number, mix in enumerate(product(DTYPES, repeat=count)):
        marks = () if number % step == 1 or len(set(mix)) == 1 else (pytest.mark.slow,)
        found.append(pytest.param(mix, marks=marks, id="-".join(mix)))
    return found


def drawn(dtypes: tuple[str, ...], count: int = COUNT) -> list[Tensor]:
    """Random bits for the first half, ordinary numbers for the rest."""
    half = count // 2
    return [
        torch.cat(
            [any_bits(DTYPES[dtype], half, seed), values(dtype, (count - half,), 2 * seed + 1)]
        )
        for seed, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("mix", some_of(4))
def test_transfer(mix: tuple[str, ...]) -> None:
    for alpha in ALPHAS:
        inputs, out = drawn(mix[:3]), torch.empty(COUNT, dtype=DTYPES[mix[3]])
        found = call("transfer", *inputs, out, alpha=alpha)
        assert same(out, transfer(*inputs, alpha, out.dtype))
        assert found == (not finite(out))


@pytest.mark.parametrize("mix", some_of(3))
def test_apply(mix: tuple[str, ...]) -> None:
    for alpha in ALPHAS:
        inputs, out = drawn(mix[:2]), torch.empty(COUNT, dtype=DTYPES[mix[2]])
        found = call("apply", *inputs, out, alpha=alpha)
        assert same(out, apply(*inputs, alpha, out.dtype))
        assert found == (not finite(out))


@pytest.mark.parametrize("mix", some_of(3))
def test_subtract(mix: tuple[str, ...]) -> None:
    (ours, theirs), out = drawn(mix[:2]), torch.empty(COUNT, dtype=DTYPES[mix[2]])
    found, (_, _, unchanged, inexact) = call_with_sums("subtract", ours, theirs, out)
    delta = ours.double() - theirs.double()
    assert same(out, delta.to(out.dtype))
    assert found == (not finite(out))
    fine = ours.isfinite() & theirs.isfinite() & out.isfinite()
    ours, theirs, delta, out = (values[fine].clone() for values in (ours, theirs, delta, out))
    assert not call_with_sums("subtract", ours, theirs, out)[0]
    _, (of_delta, of_base, unchanged, inexact) = call_with_sums("subtract", ours, theirs, out)
    alike = to_bits(ours) == to_bits(theirs) if ours.dtype == theirs.dtype else delta == 0
    assert unchanged == int(alike.sum())
    back = (out.double() + theirs.double()).to(ours.dtype)
    assert inexact == int((to_bits(back) != to_bits(ours)).sum())
    assert of_delta == pytest.approx(float((delta * delta).sum()), rel=1e-13)
    assert of_base == pytest.approx(float((theirs.double() ** 2).sum()), rel=1e-13)


@pytest.mark.parametrize("mix", some_of(2))
def test_store(mix: tuple[str, str]) -> None:
    """A difference in float64, as an adapter has it; finetuned is its sum with base, rounded."""
    (theirs,), out = drawn(mix[:1]), torch.empty(COUNT, dtype=DTYPES[mix[1]])
    delta = values("F64", (COUNT,), 5)
    delta[7] = math.nan
    found, _ = call_with_sums("store", delta, theirs, out)
    assert same(out, delta.to(out.dtype))
    assert found == 1
    fine = theirs.isfinite() & delta.to(out.dtype).isfinite()
    fine &= (theirs.double() + delta).to(theirs.dtype).isfinite()
    theirs, delta, out = theirs[fine].clone(), delta[fine].clone(), out[fine].clone()
    delta[::5] = 0
    found, sums = call_with_sums("store", delta, theirs, out)
    assert found == 0
    assert same(out, delta.to(out.dtype))
    ours = (theirs.double() + delta).to(theirs.dtype)
    back = (theirs.double() + out.double()).to(theirs.dtype)
    assert sums[2] == int((to_bits(ours) == to_bits(theirs)).sum()) > 0
    assert sums[3] == int((to_bits(back) != to_bits(ours)).sum())
    assert sums[0] == pytest.approx(float((delta * delta).sum()), rel=1e-13)
    assert sums[1] == pytest.approx(float((theirs.double() ** 2).sum()), rel=1e-13)


@pytest.mark.parametrize("mix", some_of(2))
def test_contrast(mix: tuple[str, ...]) -> None:
    left, right = (values(dtype, (COUNT,), seed) for seed, dtype in enumerate(mix))
    right[::3] = left[::3].to(right.dtype)
    unchanged, sums = call_with_sums("contrast", left, right)
    delta = right.double() - left.double()
    alike = to_bits(left) == to_bits(right) if left.dtype == right.dtype else delta == 0
    assert unchanged == int(alike.sum()) > 0
    expected = [float((each * each).sum()) for each in (delta, left.double(), right.double())]
    assert sums[:3] == pytest.approx(expected, rel=1e-13)


def related(mix: tuple[str, ...]) -> list[Tensor]:
    """Tensors of which a third is equal, a fifth turned, and the rest near each other."""
    made = [values(mix[0], (COUNT,), 0)]
    for seed, dtype in enumerate(mix[1:], 1):
        other = made[0].double() + values("F64", (COUNT,), seed) * 0.125
        other[seed::3] = made[0][seed::3].double()
        other[seed::5] *= -1
        made.append(other.to(DTYPES[dtype]))
    return made


def alike(left: Tensor, right: Tensor) -> int:
    equal = to_bits(left) == to_bits(right) if left.dtype == right.dtype else left == right
    return int(equal.sum())


def both_and_agreeing(one: Tensor, other: Tensor) -> list[int]:
    both = (one != 0) & (other != 0)
    return [int(both.sum()), int((both & (one.sign() == other.sign())).sum())]


@pytest.mark.parametrize("mix", some_of(3))
def test_distances(mix: tuple[str, ...]) -> None:
    ours, theirs, onto = related(mix)
    found, sums = call_with_sums("distances", ours, theirs, onto, count=10)
    f, b, t = (each.double() for each in (ours, theirs, onto))
    squares = [float((each * each).sum()) for each in (f, b, t, f - b, t - b)]
    assert found == 0
    assert sums[:5] == pytest.approx(squares, rel=1e-13)
    assert sums[5] == pytest.approx(float(((f - b) * (t - b)).sum()), rel=1e-9)
    assert sums[6:8] == [alike(ours, theirs), alike(onto, theirs)]
    assert sums[8:] == both_and_agreeing(f - b, t - b)
    assert all(sums[6:])


@pytest.mark.parametrize("mix", some_of(4))
def test_gains(mix: tuple[str, ...]) -> None:
    ours, theirs, onto, other = related(mix)
    found, sums = call_with_sums("gains", ours, theirs, onto, other, count=7)
    f, b, t, d = (each.double() for each in (ours, theirs, onto, other))
    squares = [float((each * each).sum()) for each in (d, f - b, d - t)]
    assert found == 0
    assert sums[:3] == pytest.approx(squares, rel=1e-13)
    assert sums[3] == pytest.approx(float(((f - b) * (d - t)).sum()), rel=1e-9)
    assert sums[4:] == [alike(other, onto), *both_and_agreeing(f - b, d - t)]
    assert all(sums[4:])


def test_signs_where_products_would_vanish() -> None:
    """Steps whose product is 0 in float64, zeros of both signs, and NaN, which agrees with none."""
    one = torch.tensor([1e-200, -1e-200, 1e-200, 0.0, -0.0, math.nan, 1.0], dtype=torch.float64)
    other = torch.tensor([1e-200, -1e-200, -1e-200, 1.0, 1.0, 1.0, math.nan], dtype=torch.float64)
    zeros = torch.zeros(7, dtype=torch.float64)
    _, sums = call_with_sums("distances", one, zeros, other, count=10)
    assert sums[9] == 2
    assert sums[8] - 2 == 3  # two with NaN, and one with other signs


@pytest.mark.parametrize("mix", some_of(3))
def test_restore(mix: tuple[str, ...]) -> None:
    ours, theirs, stored = (values(dtype, (COUNT,), seed) for seed, dtype in enumerate(mix))
    stored = (ours.double() - theirs.double()).to(stored.dtype)
    stored[:9] = 0
    back = (stored.double() + theirs.double()).to(ours.dtype)
    expected = int((to_bits(back) != to_bits(ours)).sum())
    assert call("restore", ours, theirs, stored) == expected > 0


@pytest.mark.parametrize("mix", some_of(2))
def test_convert_and_give_back(mix: tuple[str, ...]) -> None:
    (ours,), out = drawn(mix[:1]), torch.empty(COUNT, dtype=DTYPES[mix[1]])
    assert call("convert", ours, out) == (not finite(out))
    assert same(out, ours.double().to(out.dtype))
    fine = ours.isfinite()
    ours, out = ours[fine].clone(), out[fine].clone()
    back = out.to(ours.dtype)
    assert call("give_back", ours, out) == int((to_bits(back) != to_bits(ours)).sum())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_bad_value_is_found_wherever_it_is(name: str, bad: float) -> None:
    for count in (1, 2, 63, 64, 65, 256, 300):
        tensor = torch.full((count,), torch.finfo(DTYPES[name]).max, dtype=DTYPES[name])
        assert call("check", tensor) == 0
        for at in range(count):
            spoiled = tensor.clone()
            spoiled[at] = bad
            assert call("check", spoiled) == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_of_16_bits(dtype: torch.dtype) -> None:
    every, wide = EVERY.view(dtype), torch.empty(len(EVERY), dtype=torch.float64)
    assert call("convert", every, wide) == 1
    assert same(wide, every.double())
    for step in (1, 7, 12_345, 32_768):
        other, third = every.roll(step), every.flip(0)
        for alpha in (1.0, 0.35, -1.0, 0.001):
            out = torch.empty_like(every)
            call("transfer", every, other, third, out, alpha=alpha)
            assert same(out, transfer(every, other, third, alpha, dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_rounding_beside_every_number_and_every_tie(dtype: torch.dtype, wide: torch.dtype) -> None:
    exact = EVERY.view(dtype)
    exact = exact[exact.isfinite()].to(wide).sort().values
    halfway = (exact[1:] + exact[:-1]) / 2
    beside = [
        torch.nextafter(halfway, torch.full_like(halfway, end)) for end in (-math.inf, math.inf)
    ]
    source = torch.cat([exact, halfway, *beside])
    out = torch.empty(len(source), dtype=dtype)
    call("convert", source, out)
    assert same(out, source.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_every_pair_of_16_bits(dtype: torch.dtype) -> None:
    """All 2³² sums and differences."""
    every, rows = EVERY.view(dtype), 16
    right = every.repeat(rows)
    out, delta = torch.empty_like(right), torch.empty(len(right))
    for start in range(0, len(every), rows):
        left = every[start : start + rows].repeat_interleave(len(every))
        call("apply", left, right, out, alpha=1.0)
        assert same(out, (right.double() + left.double()).to(dtype))
        call_with_sums("subtract", left, right, delta)
        assert same(delta, (left.double() - right.double()).float())


def test_bytes_that_are_the_same_are_counted() -> None:
    left, right = (any_bits(torch.int8, COUNT, seed).view(torch.uint8) for seed in range(2))
    right[5::2] = left[5::2]
    found = kernel("equal", ("U8", "U8"))(left.data_ptr(), right.data_ptr(), COUNT)
    assert found == int((left == right).sum())
    assert kernel("equal", ("U8", "U8"))(left.data_ptr(), left.data_ptr(), COUNT) == COUNT


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
def test_lanes_are_what_they_are_said_to_be(count: int) -> None:
    """The sums bit for bit, from their definition."""
    ours, theirs = values("F32", (count,), 1), values("F32", (count,), 2)
    out = torch.empty(count)
    _, (of_delta, of_base, _, _) = call_with_sums("subtract", ours, theirs, out)
    deltas = (ours.double() - theirs.double()).tolist()
    for found, numbers in ((of_delta, deltas), (of_base, theirs.double().tolist())):
        lanes = [0.0] * 256
        for place, number in enumerate(numbers):
            lanes[place % 256] += number * number
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        assert found == lanes[0]
    _, (of_delta_too, of_left, of_right, _) = call_with_sums("contrast", theirs, ours)
    assert (of_delta_too, of_left) == (of_delta, of_base)
    assert of_right == call_with_sums("contrast", ours, theirs)[1][1]


@pytest.mark.parametrize("rows", [1, 3, 128])
def test_extremes_of_blocks(rows: int) -> None:
    values = torch.randn(2, 200, 70, generator=torch.Generator().manual_seed(rows)).numpy()
    values[0, :5] = -np.abs(values[0, :5])
    blocks = -(-200 // rows)
    padded = np.full((2, blocks * rows, 96), np.nan, np.float32)
    padded[:, :200, :70] = values
    grid = padded.reshape(2, blocks, rows, 3, 32)
    expected = np.nanmin(grid, (2, 4)), np.nanmax(grid, (2, 4))
    found = np.full((2 * blocks, 3), np.inf, np.float32), np.full((2 * blocks, 3), -np.inf, "f4")
    flat = values.reshape(-1)
    for start in range(0, len(flat), 999):  # pieces that begin and end inside blocks
        part = flat[start : start + 999].copy()
        place = start, len(part), 70, 200, rows, 32, blocks, 3, 0
        addresses = [array.ctypes.data for array in (part, *found)]
        kernel("extremes", ("F32", "F32", "F32"))(*addresses, *place)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.reshape(theirs.shape), theirs)
