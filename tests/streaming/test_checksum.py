"""Checksums of parts in any order are those of the definition."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.streaming.checksum import NAME, block_digests, combine
from diffxfer.streaming.plan import BLOCK_ELEMENTS
from tests.helpers import block_checksum, to_bytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS])
def test_is_the_hash_of_the_hashes_of_blocks(dtype: torch.dtype, elements: int) -> None:
    tensor = torch.arange(elements).to(dtype)
    digests = block_digests(memoryview(to_bytes(tensor)), tensor.element_size())
    assert len(digests) == 16 * -(-elements // BLOCK_ELEMENTS)
    assert combine({0: digests}).hex() == block_checksum(tensor)


@given(st.permutations(range(5)), st.integers(1, 3))
def test_any_cut_and_order_gives_the_same(order: list[int], blocks: int) -> None:
    data = memoryview(bytes(4 * BLOCK_ELEMENTS) + b"rest")
    whole = combine({0: block_digests(data, 1)})
    step = blocks * BLOCK_ELEMENTS
    starts = [index * step for index in order if index * step < len(data)]
    assert combine({s: block_digests(data[s : s + step], 1) for s in starts}) == whole


def test_nothing_has_the_hash_of_nothing() -> None:
    assert combine({}) == xxhash.xxh3_128_digest(b"")


def test_known_values() -> None:
    """Part of the format: manifests that are out there hold them."""
    assert NAME == "xxh3-128/blocks-262144"
    assert BLOCK_ELEMENTS == 262144
    known = "ec2cc2acd1a214e06230d9d811b6dfab"
    assert combine({0: block_digests(memoryview(b"diffxfer"), 1)}).hex() == known
