"""Rounded blocks: codes, scales and values are those of a computation in numpy and PyTorch."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zstandard

from diffxfer.checkpoints.encodings.packed import prefix
from diffxfer.checkpoints.encodings.packing import BLOCK, BlockEncoder
from diffxfer.checkpoints.encodings.rounding import ROUNDINGS, encode
from diffxfer.errors import CheckpointError
from tests.checkpoints.encodings.test_packed import read, stored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = np.ndarray[Any, np.dtype[Any]]
_RANDOM = np.random.default_rng(7)
MOST = {"int8": 127, "int4": 7}


def drawn(*shape: int) -> Array:
    values: Array = _RANDOM.standard_normal(shape) * 1e-3 * _RANDOM.random((*shape[:-1], 1))
    return values


VALUES = {
    "ordinary": drawn(50, 96),
    "an odd width": drawn(31, 33),
    "one odd row": drawn(1, 35),
    "heavy tails": drawn(20, 64) ** 3 * 1e6,
    "a row of zeros": np.concatenate([drawn(2, 40), np.zeros((1, 40)), -drawn(1, 40)]),
    "all equal": np.full((3, 32), -2.5e-3),
    "tiny": drawn(3, 40) * 1e-38,
    "too tiny for a scale": np.full((2, 32), 1e-44),
    "large": np.full((2, 32), 1.6e38) * drawn(2, 1),
}


def rows(values: Array, start: int = 0, stop: int | None = None) -> list[Array]:
    """The parts of rows in a range of elements."""
    width, flat = values.shape[-1], values.reshape(-1)
    stop = values.size if stop is None else stop
    cuts = [start, *range(start - start % width + width, stop, width), stop]
    return [flat[a:b] for a, b in pairwise(cuts)]


def as_bfloat16(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().bfloat16().item()


def candidates(part: Array, form: str) -> list[float]:
    largest = float(np.abs(part).max())
    steps = 8 if form == "int4" else 1
    return [as_bfloat16(largest * (1 - k / 16) / MOST[form]) for k in range(steps)]


def integers(part: Array, scale: float, form: str) -> Array:
    if scale == 0:
        return np.zeros(len(part))
    # Python rounds a tie to the even one too.
    most, inverse = MOST[form], 1 / scale
    return np.array([float(min(max(round(float(x) * inverse), -most), most)) for x in part])


def unpack(content: Array, form: str, count: int, parts: int) -> tuple[Array, Array]:
    """The integers and the scales of a block, by its description."""
    scales = (content[: 2 * parts].view("<u2").astype(np.uint32) << 16).view(np.float32)
    codes = content[2 * parts :].astype(np.int64)
    if form == "int4":
        codes = np.stack([codes % 16, codes // 16], 1).reshape(-1)
        assert (codes[count:] == 8).all()
        return codes[:count] - 8, scales
    return codes - 128, scales


@pytest.mark.parametrize("form", ROUNDINGS)
@pytest.mark.parametrize("name", VALUES)
def test_codes_and_scales(name: str, form: str) -> None:
    values, width = VALUES[name], VALUES[name].shape[-1]
    found = encode(values.reshape(-1), ROUNDINGS[form], 0, width)
    assert found is not None
    content, parts = np.concatenate(found[0]), rows(values)
    assert len(content) == ROUNDINGS[form].size(values.size, 0, width)
    codes, scales = unpack(content, form, values.size, len(parts))
    done = 0
    for part, scale in zip(parts, scales.tolist(), strict=True):
        known = candidates(part, form)
        errors = [((integers(part, s, form) * s - part) ** 2).sum() for s in known]
        assert scale in known
        assert errors[known.index(scale)] <= min(errors) * (1 + 1e-12)
        expected = integers(part, scale, form)
        assert (codes[done : done + len(part)] == expected).all()
        assert (found[1][done : done + len(part)] == expected * scale).all()
        assert not np.signbit(found[1][done : done + len(part)][expected == 0]).any()
        done += len(part)


def tensor_bytes(values: Array, form: str) -> bytes:
    flat, width, coder = values.reshape(-1), values.shape[-1], BlockEncoder(1)
    blocks = []
    for start in range(0, len(flat), BLOCK):
        found = coder.encode_rounded(
            flat[start : start + BLOCK], ROUNDINGS[form], start % width, width
        )
        assert found is not None
        blocks.append(found[0])
    return prefix(len(flat), np.array([len(block) for block in blocks], np.uint32)) + b"".join(
        blocks
    )


@pytest.mark.parametrize("form", ROUNDINGS)
def test_a_tensor_of_several_blocks_is_read_in_any_pieces(tmp_path: Path, form: str) -> None:
    """Its rows do not end where blocks do."""
    values = drawn(701, 751)
    tensor = stored(tmp_path, tensor_bytes(values, form), "F32", values.shape)
    whole = np.frombuffer(read(tensor), np.float32)
    cuts: Sequence[Sequence[int]] = ([1, 2, 751, BLOCK], [BLOCK + 1], [BLOCK - 3, 2 * BLOCK + 1])
    for pieces in cuts:
        assert read(tensor, pieces) == whole.tobytes()
    for start in range(0, values.size, BLOCK):
        done = start
        for part in rows(values, start, min(start + BLOCK, values.size)):
            made = whole[done : done + len(part)].astype(np.float64)
            fitting = [
                s for s in candidates(part, form) if (integers(part, s, form) * s == made).all()
            ]
            assert fitting
            done += len(part)


def test_int4_is_better_than_the_largest_element_alone() -> None:
    values = drawn(64, 512)
    found = encode(values.reshape(-1), ROUNDINGS["int4"], 0, 512)
    assert found is not None
    error = np.linalg.norm(found[1] - values.reshape(-1))
    plain = sum(
        ((integers(row, s, "int4") * s - row) ** 2).sum()
        for row in values
        for s in candidates(row, "int4")[:1]
    )
    assert error < 0.95 * plain**0.5
    assert error < 0.12 * np.linalg.norm(values)


@pytest.mark.parametrize("form", ROUNDINGS)
def test_size(form: str) -> None:
    """zstd saves what codes that are seldom used are worth."""
    bits = len(tensor_bytes(drawn(512, 512), form)) * 8 / BLOCK
    assert bits < {"int8": 7.6, "int4": 3.7}[form]


@pytest.mark.parametrize("form", ROUNDINGS)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 2.0**127, 1e300])
def test_what_cannot_be_rounded(odd: float, form: str) -> None:
    values = drawn(4, 32)
    values[2, 31] = odd
    assert encode(values.reshape(-1), ROUNDINGS[form], 0, 32) is None


def one_block(form: int, content: bytes, elements: int) -> bytes:
    block = struct.pack("<BI", form, 0) + zstandard.compress(content)
    return prefix(elements, np.array([len(block)], np.uint32)) + block


@pytest.mark.parametrize(
    ("form", "shape", "size", "problem"),
    [
        (4, (2, 50), 103, "expected a frame of 104 bytes, found 103"),
        (4, (2, 50), 1 << 28, "expected a frame of 104 bytes, found 268,435,456"),
        (5, (2, 50), 104, "expected a frame of 54 bytes, found 104"),
        (5, (5, 3), 17, "expected a frame of 18 bytes, found 17"),
        (6, (2, 50), 104, "expected the form 1 to 5, found 6"),
    ],
)
def test_bytes_are_not_trusted(
    tmp_path: Path, form: int, shape: tuple[int, int], size: int, problem: str
) -> None:
    data = one_block(form, bytes(size), shape[0] * shape[1])
    with pytest.raises(CheckpointError, match=problem) as caught:
        read(stored(tmp_path, data, "F32", shape))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("form", [4, 5])
def test_any_codes_and_scales_are_read(tmp_path: Path, form: int) -> None:
    """Scales that are not finite give values that are not, which every command refuses."""
    size = 2 * 2 + (100 if form == 4 else 50)
    tensor = stored(tmp_path, one_block(form, b"\xff" * size, 100), "F32", (2, 50))
    assert np.isnan(np.frombuffer(read(tensor), np.float32)).all()
    # A vector and a scalar are one row.
    data = one_block(form, bytes((0x80, 0x3F, 1)), 1)
    expected = {4: 1.0 - 128, 5: 1.0 - 8}[form]
    for shape in ((1,), ()):
        tensor = stored(tmp_path, data, "F32", shape)
        assert np.frombuffer(read(tensor), np.float32).tolist() == [expected]
