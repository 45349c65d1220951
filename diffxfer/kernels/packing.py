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

from diffxfer.kernels.dtypes import (
    bits_of_float,
    differs,
    load_word,
    low_zeros,
    read,
    store_word,
    write,
)

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


def lost(finetuned: Any, base: Any, diff: Any, marks: Any, count: int) -> np.int64:
    """Mark by 1 the elements of finetuned that base + Δ does not give back; return their number."""
    ours, theirs, delta = carray(finetuned, count), carray(base, count), carray(diff, count)
    made = carray(marks, count)
    found = np.int64(0)
    for i in range(count):
        is_lost = differs(write(read(theirs[i]) + read(delta[i]), finetuned), ours[i])
        made[i] = np.uint8(is_lost)
        found += np.int64(is_lost)
    return found


@njit(error_model="numpy")
def _kind(whole: Any, step: Any, low: int, span: int, steps: int, skip: int) -> Any:
    # Without branches: which zeros come where is not predictable.
    exponent = ((whole >> np.uint64(52)) & np.uint64(0x7FF)) - np.uint64(low)
    known = (exponent + np.uint64(1)) * np.uint64(steps) + step - np.uint64(skip)
    has_kind = np.uint64(exponent < np.uint64(span))
    known = known * has_kind + np.uint64(2) * (np.uint64(1) - has_kind)
    is_zero = np.uint64(whole << np.uint64(1) == np.uint64(0))
    return known * (np.uint64(1) - is_zero) + (whole >> np.uint64(63)) * is_zero


def count_kinds(
    elements: Any,
    kinds: Any,
    counts: Any,
    count: int,
    low: int,
    span: int,
    steps: int,
    skip: int,
) -> np.int64:
    """Write the kind of each element, and the number of elements of each kind."""
    given, made = carray(elements, count), carray(kinds, count)
    found = carray(counts, (span + 1) * steps)
    for k in range((span + 1) * steps):
        found[k] = np.uint32(0)
    for i in range(count):
        whole = bits_of_float(np.float64(given[i]))
        step = low_zeros((whole & np.uint64(_MANTISSA)) | np.uint64(_ONE)) + np.uint64(1)
        kind = _kind(whole, step, low, span, steps, skip)
        made[i] = np.uint32(kind)
        found[kind] += np.uint32(1)
    return np.int64(0)


def split(
    elements: Any,
    kinds: Any,
    ranks: Any,
    lengths: Any,
    symbols: Any,
    words: Any,
    count: int,
    most: int,
    steps: int,
    skip: int,
    skips_zeros: int,
) -> np.int64:
    """Write the symbols of elements, all or all but those of 0.0, and their bits.

    Args:
        elements: the elements.
        kinds: the kind of each.
        ranks: the symbol of each kind.
        lengths: the length of each symbol.
        symbols: receives a symbol for each element; there is room for one more.
        words: receives bits; there is room for 7 bytes for each element, and 8 more.
        count: the number of elements.
        most: the number of kinds.
        steps: see above; a power of two.
        skip: see above.
        skips_zeros: 1 to leave out 0.0.

    Returns:
        The number of bits.
    """
    given, known, rank = carray(elements, count), carray(kinds, count), carray(ranks, most)
    made, sizes = carray(symbols, count + 1), carray(lengths, _SYMBOLS)
    skipped, mask = np.uint64(skips_zeros), np.uint64(steps - 1)
    waiting, held, place, byte = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(count):
        whole = bits_of_float(np.float64(given[i]))
        kind = np.uint64(known[i])
        symbol = rank[kind]
        made[place] = symbol
        place += np.uint64(1) - (skipped & np.uint64(kind == np.uint64(0)))
        length = np.uint64(sizes[np.uint64(symbol)])
        rest = ((whole & np.uint64(_MANTISSA)) | np.uint64(_ONE)) >> (
            (kind & mask) + np.uint64(skip)
        )
        rest = (rest << np.uint64(1)) | (whole >> np.uint64(63))
        rest &= (np.uint64(1) << length) - np.uint64(1)
        waiting |= rest << held  # fewer than 8 bits wait, and an element has up to 53
        store_word(words, byte, waiting)
        held += length
        byte += held >> np.uint64(3)
        waiting >>= held & np.uint64(56)
        held &= np.uint64(7)
    store_word(words, byte, waiting)
    return np.int64(byte * np.uint64(8) + held)


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
    """Put elements together again; any input with lengths up to 57 is safe.

    Args:
        symbols: one for each flag that is 1, and at least one more byte.
        flags: 0 for an element that is 0.0, else 1.
        lengths: the length of each symbol.
        firsts: 2ⁿ of each symbol.
        scales: 2^g of each symbol.
        words: the bits.
        elements: receives the elements.
        count: the number of elements.
        last: the number of bytes less 8.

    Returns:
        The number of bits that the elements take.
    """
    given, present = carray(symbols, count + 1), carray(flags, count)
    sizes, highest = carray(lengths, _SYMBOLS), carray(firsts, _SYMBOLS)
    powers, made = carray(scales, _SYMBOLS), carray(elements, count)
    end, at, place = np.uint64(last), np.uint64(0), np.uint64(0)
    for i in range(count):
        here = np.uint64(present[i])
        symbol = np.uint64(given[place])
        place += here
        length = np.uint64(sizes[symbol]) * here
        rest = load_word(words, min(at >> np.uint64(3), end)) >> (at & np.uint64(7))
        rest &= (np.uint64(1) << length) - np.uint64(1)
        at += length
        sign = np.int64(1) - np.int64((rest & np.uint64(1)) << np.uint64(1))
        whole = np.int64(rest | np.uint64(1) | highest[symbol]) * sign
        value = np.float64(whole) * powers[symbol]
        made[i] = write(value if here else 0.0, elements)
    return np.int64(at)
