"""Checksums of tensors whose parts are processed in any order.

A tensor's checksum is the xxh3-128 of the xxh3-128 digests of its blocks of `BLOCK_ELEMENTS`
elements, in order. It protects against accidents, not against an adversary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from diffxfer.streaming.plan import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "xxh3-128/blocks-262144"
"""The name of this checksum in a manifest."""


def block_digests(data: memoryview, itemsize: int) -> bytes:
    """The digests of consecutive blocks, joined.

    Args:
        data: bytes that begin at a block's first element.
        itemsize: bytes per element.
    """
    step = BLOCK_ELEMENTS * itemsize
    if len(data) <= step:
        return xxhash.xxh3_128_digest(data)
    return b"".join(
        xxhash.xxh3_128_digest(data[start : start + step]) for start in range(0, len(data), step)
    )


def combine(digests: Mapping[int, bytes]) -> bytes:
    """The checksum of a tensor.

    Args:
        digests: `block_digests` of its parts by the part's first element.
    """
    return xxhash.xxh3_128_digest(b"".join(digests[start] for start in sorted(digests)))
