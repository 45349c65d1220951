"""Splitting float32 into symbols and bits that compress well, and joining them again.

The kind of an element is its exponent and a step: 1 + the number of zeros at the end of its
mantissa. +0.0 is a kind of its own. Kinds have most of what can be predicted. A table gives an
exponent, a step and a length to each symbol. Symbol 0, with the exponent 0, the step 0 and the
length 32, is for elements of any other kind. An element is made of its symbol and of as many bits
as the length says:

    (its lowest bit << 31) XOR ((bits OR 1) << step >> 1) XOR (exponent << 23), modulo 2³²

So the bits are the sign, and above it the mantissa without the zeros and the 1 before them. Bits of
consecutive elements follow each other, the lowest first.

Imported only by numba's compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from diffxfer.kernels.dtypes import bits_of_float, differs, low_zeros, read, write

_KINDS, _SYMBOLS = 8192, 256
"""256 exponents by 32 steps; the numbers that a symbol can be."""


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
    """32 · exponent + step, 25 for +0.0."""
    step = low_zeros((whole & np.uint32(0x7FFFFF)) | np.uint32(0x800000)) + np.uint32(1)
    step += np.uint32(whole == np.uint32(0))
    return ((whole >> np.uint32(18)) & np.uint32(0x1FE0)) | step


def count_kinds(elements: Any, counts: Any, count: int) -> np.int64:
    """Count the elements of each kind: 32 · exponent + step, 25 for +0.0."""
    given, found = carray(elements, count), carray(counts, _KINDS)
    for k in range(_KINDS):
        found[k] = np.uint32(0)
    for i in range(count):
        found[_kind(given[i])] += np.uint32(1)
    return np.int64(0)


def split(
    elements: Any,
    ranks: Any,
    table: Any,
    symbols: Any,
    words: Any,
    count: int,
    skips_zeros: int,
) -> np.int64:
    """Write the symbols of elements, all or all but those of +0.0, and their bits.

    Args:
        elements: the bits of float32.
        ranks: the symbol of each kind.
        table: the exponents, the steps and the lengths of the symbols.
        symbols: receives a symbol for each element; there is room for one more.
        words: receives bits; there is a word more than there are elements.
        count: the number of elements.
        skips_zeros: 1 to leave out +0.0.

    Returns:
        The number of bits.
    """
    given, known = carray(elements, count), carray(ranks, _KINDS)
    made, packed = carray(symbols, count + 1), carray(words, count + 1)
    fixed, skipped = carray(table, 3 * _SYMBOLS), np.uint64(skips_zeros)
    waiting, held, place, word = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(count):
        whole = given[i]
        symbol = np.uint64(known[_kind(whole)])
        made[place] = np.uint8(symbol)
        place += np.uint64(1) - (skipped & np.uint64(whole == np.uint32(0)))
        step = np.uint64(fixed[symbol + np.uint64(_SYMBOLS)])
        length = np.uint64(fixed[symbol + np.uint64(2 * _SYMBOLS)])
        rest = (np.uint64(whole & np.uint32(0x7FFFFFFF)) >> step) << np.uint64(1)
        rest |= np.uint64(whole >> np.uint32(31))
        waiting |= (rest & ((np.uint64(1) << length) - np.uint64(1))) << held
        held += length
        packed[word] = np.uint32(waiting & np.uint64(0xFFFFFFFF))
        is_full = held >> np.uint64(5)
        word += is_full
        waiting >>= is_full << np.uint64(5)
        held &= np.uint64(31)
    packed[word] = np.uint32(waiting & np.uint64(0xFFFFFFFF))
    return np.int64(word * np.uint64(32) + held)


def join(
    symbols: Any,
    flags: Any,
    table: Any,
    words: Any,
    elements: Any,
    count: int,
    last: int,
) -> np.int64:
    """Put elements together again; any lengths up to 32 and steps up to 31 are safe.

    Args:
        symbols: one for each flag that is 1, and at least one more byte.
        flags: 0 for an element that is +0.0, else 1.
        table: the exponents, the steps and the lengths of the symbols.
        words: the bits, and a word more.
        elements: receives the bits of float32.
        count: the number of elements.
        last: the number of words less 2.

    Returns:
        The number of bits that the elements take.
    """
    given, present = carray(symbols, count + 1), carray(flags, count)
    fixed, packed = carray(table, 3 * _SYMBOLS), carray(words, last + 2)
    made = carray(elements, count)
    end, at, place = np.uint64(last), np.uint64(0), np.uint64(0)
    for i in range(count):
        here = np.uint64(present[i])
        symbol = np.uint64(given[place])
        place += here
        step = np.uint64(fixed[symbol + np.uint64(_SYMBOLS)])
        length = np.uint64(fixed[symbol + np.uint64(2 * _SYMBOLS)]) * here
        word = min(at >> np.uint64(5), end)
        both = np.uint64(packed[word]) | (np.uint64(packed[word + np.uint64(1)]) << np.uint64(32))
        rest = (both >> (at & np.uint64(31))) & ((np.uint64(1) << length) - np.uint64(1))
        at += length
        whole = (rest << np.uint64(31)) ^ (((rest | np.uint64(1)) << step) >> np.uint64(1))
        whole ^= np.uint64(fixed[symbol]) << np.uint64(23)
        made[i] = np.uint32((whole * here) & np.uint64(0xFFFFFFFF))
    return np.int64(at)
