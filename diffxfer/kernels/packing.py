"""Splitting float32 into symbols and bits that compress well, and joining them again.

The kind of an element is its exponent and a step: 1 + the number of zeros at the end of its
mantissa, 25 for +0.0. Kinds have most of what can be predicted. A table gives the kinds of a block
a symbol each; symbol 0 is any other kind. What is left of an element are its bits: the sign, and
above it the mantissa without the zeros and the 1 before them; of a kind without a symbol all bits,
the sign below the others. Bits of consecutive elements follow each other, the lowest first.

Imported only by numba's compiler. Tables have room for 256 numbers, `KINDS` for all kinds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import bits_of_float, differs, low_zeros, read, write

_KINDS = 8192
"""256 exponents by 32 steps, of which some do not occur."""
_ALL, _POWER, _ZERO = 0, 24, 25
"""The steps of elements that are stored whole, of powers of two, and of +0.0."""


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
def _kind(whole: Any) -> Any:
    mantissa = whole & np.uint32(0x7FFFFF)
    step = low_zeros(mantissa | np.uint32(0x800000)) + np.uint32(1)
    step = np.uint32(_ZERO) if whole == np.uint32(0) else step
    return ((whole >> np.uint32(18)) & np.uint32(0x1FE0)) | step


@njit(error_model="numpy")
def _length(step: Any) -> Any:
    """The number of bits of an element."""
    if step == np.uint32(_ALL):
        return np.uint32(32)
    if step >= np.uint32(_POWER):
        return np.uint32(_ZERO) - step
    return np.uint32(_POWER) - step


def count_kinds(elements: Any, counts: Any, count: int) -> np.int64:
    """Count the elements of each kind: 32 · exponent + step."""
    given, found = carray(elements, count), carray(counts, _KINDS)
    for k in range(_KINDS):
        found[k] = np.uint32(0)
    for i in range(count):
        found[_kind(given[i])] += np.uint32(1)
    return np.int64(0)


def split(
    elements: Any, ranks: Any, table: Any, symbols: Any, words: Any, count: int, skips_zeros: int
) -> np.int64:
    """Write the symbols of elements, all or all but those of +0.0, and their bits.

    Args:
        elements: the bits of float32.
        ranks: the symbol of each kind.
        table: 256 exponents, and 256 steps of the symbols.
        symbols: receives a symbol for each element.
        words: receives bits; there is a word more than there are elements.
        count: the number of elements.
        skips_zeros: 1 to leave out +0.0.

    Returns:
        The number of bits.
    """
    given, known = carray(elements, count), carray(ranks, _KINDS)
    steps, made, packed = carray(table, 512), carray(symbols, count + 1), carray(words, count + 1)
    skipped = np.uint64(skips_zeros)
    waiting, held, place, word = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(count):
        whole = given[i]
        symbol = known[_kind(whole)]
        made[place] = symbol
        place += np.uint64(1) - (skipped & np.uint64(whole == np.uint32(0)))
        step = np.uint32(steps[np.uint64(symbol) + np.uint64(256)])
        most = np.uint32(0x7FFFFFFF) if step == np.uint32(_ALL) else np.uint32(0x7FFFFF)
        mantissa = np.uint64((whole & most) >> step)
        waiting |= ((mantissa << np.uint64(1)) | np.uint64(whole >> np.uint32(31))) << held
        held += np.uint64(_length(step))
        packed[word] = np.uint32(waiting & np.uint64(0xFFFFFFFF))
        is_full = held >> np.uint64(5)
        word += is_full
        waiting >>= is_full << np.uint64(5)
        held &= np.uint64(31)
    packed[word] = np.uint32(waiting & np.uint64(0xFFFFFFFF))
    return np.int64(word * np.uint64(32) + held)


def join(
    symbols: Any, flags: Any, table: Any, words: Any, parts: Any, elements: Any,
    count: int, last: int,
) -> np.int64:
    """Put elements together again; any input is safe.

    Args:
        symbols: one for each flag that is 1, and at least one more byte.
        flags: 0 for an element that is +0.0, else 1.
        table: 256 exponents, and 256 steps.
        words: the bits.
        parts: room for 512 numbers.
        elements: receives the bits of float32.
        count: the number of elements.
        last: the number of words less 2.

    Returns:
        The number of bits that the elements take, -1 for an impossible step.
    """
    given, present, known = carray(symbols, count + 1), carray(flags, count), carray(table, 512)
    packed, made = carray(words, last + 2), carray(elements, count)
    fixed, lengths = carray(parts, 256), carray(parts, 512)
    for k in range(256):
        step = np.uint32(known[256 + k])
        if step > np.uint32(_ZERO):
            return np.int64(-1)
        one = ((np.uint32(1) << step) >> np.uint32(1)) & np.uint32(0x7FFFFF)
        fixed[k] = (np.uint32(known[k]) << np.uint32(23)) | one
        lengths[256 + k] = (_length(step) << np.uint32(8)) | step
    end, at, place = np.uint64(last), np.uint64(0), np.uint64(0)
    for i in range(count):
        here = np.uint64(present[i])
        symbol = np.uint64(given[place])
        place += here
        how = np.uint64(lengths[symbol + np.uint64(256)])
        length = (how >> np.uint64(8)) * here
        word = min(at >> np.uint64(5), end)
        both = np.uint64(packed[word]) | (np.uint64(packed[word + np.uint64(1)]) << np.uint64(32))
        rest = (both >> (at & np.uint64(31))) & ((np.uint64(1) << length) - np.uint64(1))
        at += length
        mantissa = (rest >> np.uint64(1)) << (how & np.uint64(255))
        sign = (rest & np.uint64(1)) << np.uint64(31)
        made[i] = np.uint32((sign | mantissa | np.uint64(fixed[symbol])) * here)
    return np.int64(at)
