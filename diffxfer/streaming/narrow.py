"""Fewer passes for the same bits, where that is proved; everything else is `ops`.

A chunk's time is its passes over memory. Over 256 Ki elements of bfloat16 they took, in µs on one
core of an AMD EPYC: a copy to float64 31, a float64 sum 50 to 60, the copy back 45, and so 157 for
an `apply` and 257 for a `transfer`. What is here took 52 and 200. A difference to be stored gains
nothing: its norms need Δ and base in float64, which took 108 at once and 114 by way of float32.

The proofs rest on two facts.

- A sum of two numbers of p bits that is rounded to q ≥ 2p + 2 bits first and to p bits then is the
  sum rounded once (Figueroa 1995, "When is double rounding innocuous?"): float32 (24) within
  float64 (53), bfloat16 (8) and float16 (11) within float32. Sums in the range of subnormals are
  exact. So with alpha 1, `R.to(dtype)` of t + D with one dtype for all three is that dtype's own
  sum.
- bfloat16's f and b with at most 16 between their exponents are whole multiples, of at most
  255 and 255·2¹⁶, of one power of two. f − b is one of at most 255 + 255·2¹⁶ < 2²⁴: float32 holds
  it, as float64 does. t + D is then a sum of two float32 numbers, to which the first fact applies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffxfer.streaming import ops

_IN_FLOAT32 = frozenset({torch.float32, torch.bfloat16, torch.float16})
_EXPONENTS_APART = 16
_FRACTION_BITS = 7


def add(left: Tensor, right: Tensor, out: Tensor, *, finite: bool = False) -> bool:
    """The sum of two tensors, as that of float64 which is then rounded to their dtype.

    Args:
        left: shape `(n,)`, on the CPU.
        right: shape `(n,)`, on the CPU.
        out: shape `(n,)`, receives the sum.
        finite: whether both are known to be finite. Their sum may overflow, but to the same
            infinity in every dtype that rounds once; only of a NaN the bits may be others.

    Returns:
        False where that is not proved, or `out` is not finite though `finite` did not tell of its
        parts: compute it in float64 then.
    """
    if not left.dtype == right.dtype == out.dtype or out.dtype not in _IN_FLOAT32:
        return False
    torch.add(left, right, out=out)
    return finite or ops.all_finite(out)


def transfer(
    finetuned: Tensor, base: Tensor, target: Tensor, out: Tensor, one: Tensor, other: Tensor
) -> bool:
    """The graft target + (finetuned − base), as `ops` computes it with alpha 1.

    Args:
        finetuned: shape `(n,)`, on the CPU.
        base: shape `(n,)`, on the CPU.
        target: shape `(n,)`, on the CPU.
        out: shape `(n,)`, receives the result.
        one: float64 of shape `(n,)`, overwritten.
        other: float64 of shape `(n,)`, overwritten.

    Returns:
        False where that is not proved, or `out` is not finite: compute it in float64 then.
    """
    if not finetuned.dtype == base.dtype == torch.bfloat16:
        return False
    if target.dtype not in _IN_FLOAT32 or out.dtype not in _IN_FLOAT32:
        return False
    count = len(out)
    if not _near(finetuned, base, one.view(torch.int16)[:count]):
        return False
    # A buffer for two passes each: mixing dtypes in one call takes longer than converting before.
    delta, wide = one.view(torch.float32)[:count], other.view(torch.float32)[:count]
    delta.copy_(finetuned)
    wide.copy_(base)
    delta.sub_(wide)
    wide.copy_(target)
    wide.add_(delta)
    out.copy_(wide)
    return ops.all_finite(out)


def _near(left: Tensor, right: Tensor, bits: Tensor) -> bool:
    """Whether all elements have exponents that are at most 16 apart, or more than 230.

    Without its sign, the bits of a bfloat16 are a number that grows by 2⁷ with each exponent. The
    doubled difference of two drops the sign bit, and wraps only where the exponents are more than
    230 apart: the smaller number is lost in any rounding then, in float32 as in float64. Zero
    beside a number that is not tiny counts as far, which costs time alone.

    Args:
        left: bfloat16 of shape `(n,)`.
        right: bfloat16 of shape `(n,)`.
        bits: int16 of shape `(n,)`, overwritten.
    """
    torch.sub(left.view(torch.int16), right.view(torch.int16), out=bits)
    bits.add_(bits)
    low, high = torch.aminmax(bits)
    limit = 2 * (_EXPONENTS_APART << _FRACTION_BITS)
    return -limit <= low.item() and high.item() <= limit
