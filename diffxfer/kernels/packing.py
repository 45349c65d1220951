"""Splitting floats into symbols and bits that compress well, and joining them again.

A finite element is ±m·2^g with an odd m; g and the number of bits of m make its kind, which has
most of what can be predicted. Zeros are kinds of their own. A table gives a g, an n and a length to
each symbol. An element is made of its symbol and of as many bits as the length says:

    ±(bits OR 1 OR 2ⁿ)·2^g, negative if the lowest bit is 1; in float64

So the bits are the sign, and above it those of m without its first and last one. A symbol for
several kinds of one g has an n of 64, which adds nothing; all bits of m but the last one are given.
For zeros, g is so low that the product is zero. Bits of consecutive elements follow each other,
the lowest first.

Kinds are numbered here as (exponent − low)·steps + step − skip, from `steps` on: the exponent is
that of float64, and the step 1 + the number of zeros at the end of the mantissa. 0 and 1 are the
kinds of 0.0 and −0.0, and 2 that of what has no kind here, such as infinity.

Imported only by numba's compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import bits_of_float, differs, low_zeros, read, write

_SYMBOLS = 256
_MANTISSA, _ONE = (1 << 52) - 1, 1 << 52


def narrow(values: Any, out: Any, count: int) -> np.int64:
    """Round float64 to float32; return 1 if a value changes, plus 2 if one is no bfloat16."""
    given, made = carray(values, count), carray(out, count)
    changed, low = np.uint32(0), np.uint32(0)
    for i in range(count):
        value = given[i]
        single = np.float32(value)
        made[i] = single
        # By bits, so that a NaN keeps its payload.
        other = bits_of_float(np.float64(single)) != bits_of_float(value)
        changed = np.uint32(changed | np.uint32(other))
        low = np.uint32(low | (bits_of_float(single) & np.uint32(0xFFFF)))
    return np.int64(changed) + np.int64(2 if low else 0)


def mend(finetuned: Any, base: Any, out: Any, count: int) -> np.int64:
    """Change Δ where finetuned is −0.0 and base + Δ is 0.0; return how many are given back then.

    −0.0 is the sum of −0.0 and −0.0, or of 0.0 and a number that finetuned's dtype rounds to −0.0.
    """
    ours, theirs, made = carray(finetuned, count), carray(base, count), carray(out, count)
    mended = 0
    for i in range(count):
        value = read(theirs[i])
        if value != 0.0 or differs(ours[i], write(-0.0, finetuned)):
            continue
        if not differs(write(value + read(made[i]), finetuned), ours[i]):
            continue
        for delta in (-0.0, -1.401298464324817e-45, -5e-324):  # the least of float32, and float64
            if not differs(write(value + delta, finetuned), ours[i]):
                made[i] = write(delta, out)
                mended += 1
                break
    return np.int64(mended)


@njit(error_model="numpy")
def _kind(whole: Any, step: Any, low: int, span: int, steps: int, skip: int) -> Any:
    exponent = np.int64((whole >> np.uint64(52)) & np.uint64(0x7FF)) - np.int64(low)
    known = exponent * np.int64(steps) + np.int64(step) - np.int64(skip) + np.int64(steps)
    known = known if np.uint64(exponent) < np.uint64(span) else np.int64(2)
    is_zero = whole << np.uint64(1) == np.uint64(0)
    return np.uint64(np.int64(whole >> np.uint64(63)) if is_zero else known)


@njit(error_model="numpy")
def _step(whole: Any) -> Any:
    return low_zeros((whole & np.uint64(_MANTISSA)) | np.uint64(_ONE)) + np.uint64(1)


def count_kinds(
    elements: Any, counts: Any, count: int, low: int, span: int, steps: int, skip: int
) -> np.int64:
    """Count the elements of each kind."""
    given, found = carray(elements, count), carray(counts, (span + 1) * steps)
    for k in range((span + 1) * steps):
        found[k] = np.uint32(0)
    for i in range(count):
        whole = bits_of_float(np.float64(given[i]))
        found[_kind(whole, _step(whole), low, span, steps, skip)] += np.uint32(1)
    return np.int64(0)


def split(
    elements: Any,
    ranks: Any,
    lengths: Any,
    symbols: Any,
    words: Any,
    count: int,
    low: int,
    span: int,
    steps: int,
    skip: int,
    skips_zeros: int,
) -> np.int64:
    """Write the symbols of elements, all or all but those of 0.0, and their bits.

    Args:
        elements: the elements; every one has a kind.
        ranks: the symbol of each kind.
        lengths: the length of each symbol.
        symbols: receives a symbol for each element; there is room for one more.
        words: receives bits; there is a word more than there are elements.
        count: the number of elements.
        low: see above.
        span: the number of exponents.
        steps: see above.
        skip: see above.
        skips_zeros: 1 to leave out 0.0.

    Returns:
        The number of bits.
    """
    given, known = carray(elements, count), carray(ranks, (span + 1) * steps)
    made, packed = carray(symbols, count + 1), carray(words, count + 1)
    sizes, skipped = carray(lengths, _SYMBOLS), np.uint64(skips_zeros)
    waiting, held, place, word = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(count):
        whole = bits_of_float(np.float64(given[i]))
        step = _step(whole)
        symbol = known[_kind(whole, step, low, span, steps, skip)]
        made[place] = symbol
        place += np.uint64(1) - (skipped & np.uint64(whole == np.uint64(0)))
        length = np.uint64(sizes[np.uint64(symbol)])
        rest = ((whole & np.uint64(_MANTISSA)) | np.uint64(_ONE)) >> step
        rest = (rest << np.uint64(1)) | (whole >> np.uint64(63))
        rest &= (np.uint64(1) << length) - np.uint64(1)
        waiting |= rest << held
        packed[word] = waiting
        is_full = (held + length) >> np.uint64(6)
        word += is_full
        over = (rest >> np.uint64(1)) >> (np.uint64(63) - held)
        waiting = over if is_full else waiting
        held = (held + length) & np.uint64(63)
    packed[word] = waiting
    return np.int64(word * np.uint64(64) + held)


def join(
    symbols: Any,
    flags: Any,
    lengths: Any,
    firsts: Any,
    scales: Any,
    words: Any,
    elements: Any,
    count: int,
    last: int,
) -> np.int64:
    """Put elements together again; any input with lengths up to 63 is safe.

    Args:
        symbols: one for each flag that is 1, and at least one more byte.
        flags: 0 for an element that is 0.0, else 1.
        lengths: the length of each symbol.
        firsts: 2ⁿ of each symbol.
        scales: 2^g of each symbol.
        words: the bits.
        elements: receives the elements.
        count: the number of elements.
        last: the number of words less 2.

    Returns:
        The number of bits that the elements take.
    """
    given, present = carray(symbols, count + 1), carray(flags, count)
    sizes, highest = carray(lengths, _SYMBOLS), carray(firsts, _SYMBOLS)
    powers, packed = carray(scales, _SYMBOLS), carray(words, last + 2)
    made = carray(elements, count)
    end, at, place = np.uint64(last), np.uint64(0), np.uint64(0)
    for i in range(count):
        here = np.uint64(present[i])
        symbol = np.uint64(given[place])
        place += here
        length = np.uint64(sizes[symbol]) * here
        word, inside = min(at >> np.uint64(6), end), at & np.uint64(63)
        rest = packed[word] >> inside
        rest |= (packed[word + np.uint64(1)] << np.uint64(1)) << (np.uint64(63) - inside)
        rest &= (np.uint64(1) << length) - np.uint64(1)
        at += length
        sign = np.int64(1) - np.int64((rest & np.uint64(1)) << np.uint64(1))
        whole = np.int64(rest | np.uint64(1) | highest[symbol]) * sign
        value = np.float64(whole) * powers[symbol]
        made[i] = write(value if here else 0.0, elements)
    return np.int64(at)
