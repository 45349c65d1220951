"""A device's arithmetic, on every bit pattern of the 16-bit types and corners of the wider ones."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from diffxfer.streaming import torch_ops
from tests.helpers import DTYPES, same_bits, to_bits, values

ALPHAS = [1.0, 0.5, -1.3, 0.1, 1e-300, -0.0]


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def corners(dtype: torch.dtype) -> Tensor:
    found = torch.finfo(dtype)
    some = [0.0, 1.0, 1 / 3, found.max, found.tiny, found.smallest_normal / 4, found.eps]
    made = torch.tensor(some, dtype=torch.float64).to(dtype)
    return torch.cat([made, -made])


@pytest.mark.parametrize("finetuned", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_subtracts_in_float64(finetuned: str, base: str) -> None:
    left, right = corners(DTYPES[finetuned]), corners(DTYPES[base])
    pairs = list(product(range(len(left)), range(len(right))))
    left, right = left[[i for i, _ in pairs]], right[[j for _, j in pairs]]
    delta, base64 = torch.empty(2, len(pairs), dtype=torch.float64)
    torch_ops.subtract(left, right, delta, base64)
    assert same_bits(delta, left.double() - right.double())
    assert same_bits(base64, right.double())
    expected = [x - y for x, y in zip(left.tolist(), right.tolist(), strict=True)]
    assert delta.tolist() == expected


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("target", DTYPES)
def test_adds_in_two_roundings(target: str, alpha: float) -> None:
    start, delta = values(target, (5000,), 1), values("F64", (5000,), 2)
    expected = [t + d * alpha for t, d in zip(start.tolist(), delta.tolist(), strict=True)]
    total = torch.empty(5000, dtype=torch.float64)
    torch_ops.add_scaled(start, delta, alpha, total)
    assert same_bits(total, torch.tensor(expected, dtype=torch.float64))


def test_a_contracted_product_would_show() -> None:
    """The test above can tell: a fused multiply-add gives other bits."""
    start, delta = values("F64", (5000,), 1), values("F64", (5000,), 2)
    fused = torch.add(start, delta, alpha=0.1)
    separate = start + delta * 0.1
    if same_bits(fused, separate):
        pytest.skip("this processor does not contract")
    total = torch.empty(5000, dtype=torch.float64)
    torch_ops.add_scaled(start, delta, 0.1, total)
    assert same_bits(total, separate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_tell_zeros_and_nans_apart(dtype: str) -> None:
    left = torch.tensor([0.0, 1.0, math.nan, -0.0, 2.0], dtype=DTYPES[dtype])
    right = torch.tensor([-0.0, 1.0, math.nan, -0.0, 3.0], dtype=DTYPES[dtype])
    assert int((torch_ops.bits(left) != torch_ops.bits(right)).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_survives_the_way_through_float64(dtype: torch.dtype) -> None:
    patterns = every_pattern(dtype)
    wide = torch.empty(len(patterns), dtype=torch.float64).copy_(patterns)
    back = torch.empty_like(patterns).copy_(wide)
    numbers = ~torch.isnan(patterns)
    assert torch.equal(to_bits(back)[numbers], to_bits(patterns)[numbers])
    assert torch.isnan(back[~numbers]).all()
