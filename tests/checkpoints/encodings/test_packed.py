"""Packed tensors: any values come back bit for bit, read in any pieces; no bytes are trusted."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import save_file

from diffxfer.checkpoints.encodings.exceptions import Exceptions
from diffxfer.checkpoints.encodings.packed import HEAD, Packed, blocks_of, packed, prefix
from diffxfer.checkpoints.encodings.packing import BLOCK, LEVELS, BlockEncoder
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.reader import read_shard
from diffxfer.checkpoints.stored import BITS
from diffxfer.errors import CheckpointError
from diffxfer.streaming.plan import BLOCK_ELEMENTS
from tests.fuzzing import limited

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = np.ndarray[Any, np.dtype[Any]]
_RANDOM = np.random.default_rng(5)
_ODD = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, np.inf, -np.inf, np.nan, 3.4e38, 1.0], np.float32
)


def ordinary(count: int) -> Array:
    return (_RANDOM.standard_normal(count) * 1e-3).astype(np.float32)


def sparse(count: int) -> Array:
    return np.where(_RANDOM.random(count) < 0.1, ordinary(count), np.float32(0))


SINGLES = {
    "ordinary": ordinary(2 * BLOCK + 76),
    "sparse": sparse(BLOCK + 9),
    "any bits": _RANDOM.integers(0, 1 << 32, 70_001, np.uint32).view(np.float32),
    "zeros": np.zeros(BLOCK + 1, np.float32),
    "minus zeros": np.full(100, -0.0, np.float32),
    "odd": _ODD,
    "one": np.array([-2.5], np.float32),
    "empty": np.zeros(0, np.float32),
    "powers of two": 2.0 ** _RANDOM.integers(-149, 128, 5000).astype(np.float32),
    "a sparse end": np.concatenate([ordinary(BLOCK), sparse(13)]),
}


def bytes_of(values: Array, level: int = 1) -> bytes:
    """A packed tensor of float32 or float64 values."""
    coder = BlockEncoder(level)
    parts = [values[at : at + BLOCK] for at in range(0, len(values), BLOCK)]
    blocks = [coder.encode(part) for part in parts]
    sizes = np.array([len(block) for block in blocks], np.uint32)
    return prefix(len(values), sizes) + b"".join(blocks)


def stored(folder: Path, data: bytes, dtype: str, shape: Sequence[int]) -> Packed:
    path = folder / "model.safetensors"
    save_file({"w": np.frombuffer(data, np.uint8)}, path)
    return packed(read_shard(path)["w"], dtype, shape)


def read(tensor: Packed, cuts: Sequence[int] = ()) -> bytes:
    size = BITS[tensor.dtype] // 8
    memory = memoryview(bytearray(tensor.nbytes))
    files = one_at_a_time()
    for start, stop in zip((0, *cuts), (*cuts, tensor.elements), strict=True):
        if start < stop:
            tensor.read(files, start, memory[start * size : stop * size])
    return memory.tobytes()


def read_all(tensor: Packed) -> None:
    read(tensor)
    list(tensor.exceptions(one_at_a_time(), 0, tensor.elements))


def test_a_block_is_a_block_of_the_checksums() -> None:
    assert BLOCK == BLOCK_ELEMENTS


@pytest.mark.parametrize("level", [LEVELS[0], 3, LEVELS[-1]])
@pytest.mark.parametrize("name", SINGLES)
def test_every_bit_comes_back(tmp_path: Path, name: str, level: int) -> None:
    values = SINGLES[name]
    if level == LEVELS[-1]:
        values = values[:5000]  # a slow one
    tensor = stored(tmp_path, bytes_of(values, level), "F32", values.shape)
    assert read(tensor) == values.tobytes()


def test_doubles_come_back(tmp_path: Path) -> None:
    values = np.concatenate([_RANDOM.standard_normal(BLOCK), _ODD.astype(np.float64), [5e-324]])
    tensor = stored(tmp_path, bytes_of(values), "F64", values.shape)
    assert read(tensor) == values.tobytes()


def test_singles_are_doubles_too(tmp_path: Path) -> None:
    """A tensor is float64 if one of its blocks is; the others stay as small as they are."""
    values = SINGLES["a sparse end"]
    tensor = stored(tmp_path, bytes_of(values), "F64", values.shape)
    assert read(tensor) == values.astype(np.float64).tobytes()


def test_halves_come_back(tmp_path: Path) -> None:
    whole = _RANDOM.integers(0, 1 << 16, 3001, np.uint16)
    wide = (whole.astype(np.uint32) << 16).view(np.float32)
    tensor = stored(tmp_path, bytes_of(wide), "BF16", (3001,))
    assert read(tensor) == whole.tobytes()
    halves = _RANDOM.standard_normal(3001).astype(np.float16)
    tensor = stored(tmp_path, bytes_of(halves.astype(np.float32)), "F16", (3001,))
    assert read(tensor) == halves.tobytes()


@pytest.mark.parametrize(
    "cuts", [[1], [BLOCK], [BLOCK - 1, BLOCK + 1, 2 * BLOCK + 3], range(7, BLOCK, 65_537)]
)
def test_pieces_make_no_difference(tmp_path: Path, cuts: Sequence[int]) -> None:
    values = SINGLES["ordinary"]
    tensor = stored(tmp_path, bytes_of(values), "F32", (3, len(values) // 3))
    assert read(tensor, cuts) == values.tobytes()


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<u8"])
def test_exceptions_come_back(tmp_path: Path, kind: str) -> None:
    """Those of some elements, in every block that they are in; the values stay as they are."""
    values, coder = ordinary(2 * BLOCK + 76), BlockEncoder(1)
    dtype = {"<u2": "F16", "<u4": "F32", "<u8": "F64"}[kind]
    places = np.array([3, BLOCK - 1, BLOCK + 7, 2 * BLOCK + 75])
    bits = _RANDOM.integers(0, 1 << 16, 4, np.uint64).astype(kind)
    blocks = []
    for start in range(0, len(values), BLOCK):
        part = values[start : start + BLOCK]
        found = Exceptions(dtype, places, bits).among(start, len(part))
        blocks.append(coder.add_exceptions(coder.encode(part), found, len(part)))
    sizes = np.array([len(block) for block in blocks], np.uint32)
    tensor = stored(tmp_path, prefix(len(values), sizes) + b"".join(blocks), "F32", values.shape)
    assert read(tensor) == values.tobytes()
    for start, stop in ((0, tensor.elements), (4, BLOCK), (BLOCK, BLOCK + 8), (50, 60)):
        back = memoryview(bytearray((stop - start) * bits.itemsize))
        for at, found in tensor.exceptions(one_at_a_time(), start, stop - start):
            found.put_into(back[at * bits.itemsize :])
        expected = np.zeros(tensor.elements, kind)
        expected[places] = bits
        assert back.tobytes() == expected[start:stop].tobytes()


def test_damaged_exceptions_are_refused(tmp_path: Path) -> None:
    found = Exceptions("F32", np.arange(50), _RANDOM.integers(0, 1 << 32, 50, np.uint32))
    coder = BlockEncoder(1)
    block = bytearray(coder.add_exceptions(coder.encode(ordinary(100)), found, 100))
    block[-20] ^= 1
    tensor = stored(tmp_path, one_block(bytes(block)), "F32", (100,))
    with pytest.raises(CheckpointError, match="expected a whole frame of zstd"):
        list(tensor.exceptions(one_at_a_time(), 0, 100))


def difference(update: float) -> Array:
    """The difference of two bfloat16 models, one block."""
    base = (_RANDOM.standard_normal(BLOCK) * 0.02).astype(np.float32)
    moved = base + (_RANDOM.standard_normal(BLOCK) * update).astype(np.float32)
    rounded = [(each.view(np.uint32) >> 16 << 16).view(np.float32) for each in (base, moved)]
    return rounded[1] - rounded[0]


@pytest.mark.parametrize("update", [1e-5, 1e-4, 5e-4, 5e-3])
def test_it_takes_little_more_than_its_entropy(update: float) -> None:
    values = difference(update)
    share = np.unique(values, return_counts=True)[1] / BLOCK
    entropy = -(share * np.log2(share)).sum()
    assert len(bytes_of(values)) * 8 / BLOCK < 1.06 * entropy


def test_a_higher_level_makes_nothing_larger() -> None:
    values = difference(1e-4)
    assert len(bytes_of(values, 9)) <= len(bytes_of(values))


def test_one_element_that_needs_float64_hardly_matters() -> None:
    values = difference(5e-4)
    wide = values.astype(np.float64)
    wide[7] = 1.0 - 2.0**-40
    assert len(bytes_of(wide)) < 1.01 * len(bytes_of(values))


def test_more_kinds_than_symbols(tmp_path: Path) -> None:
    """Exponents and numbers of zeros at the end by the hundred; the rare ones share symbols."""
    exponents, zeros = _RANDOM.integers(64, 128, BLOCK), _RANDOM.integers(0, 23, BLOCK)
    mantissas = _RANDOM.integers(0, 1 << 23, BLOCK) >> zeros << zeros
    values = (exponents << 23 | mantissas).astype(np.uint32).view(np.float32)
    tensor = stored(tmp_path, bytes_of(values), "F32", values.shape)
    assert read(tensor) == values.tobytes()
    assert len(bytes_of(values)) < 4 * BLOCK


def frame(content: bytes) -> bytes:
    return zstandard.compress(content)


def unsized(content: bytes) -> bytes:
    maker = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return maker.compress(content) + maker.flush()


def block(form: int, frame: bytes, bits: bytes = b"") -> bytes:
    return struct.pack("<BI", form, len(bits)) + bits + frame


def content(symbols: bytes, *, flags: int = 255, lengths: int = 0, n: int = 0) -> bytes:
    """What a frame holds for 100 elements."""
    table = np.repeat(np.array([[0], [n], [lengths]], np.int16), 256, axis=1)
    return bytes([flags]) * 13 + symbols + table.tobytes()


def one_block(block: bytes, elements: int = 100) -> bytes:
    return prefix(elements, np.array([len(block)], np.uint32)) + block


def with_frame(data: bytes) -> bytes:
    """A good block, with a frame of exceptions."""
    block = BlockEncoder(1).encode(ordinary(100))
    whole = bytes((block[0] | 0x80,)) + block[1:] + data + struct.pack("<I", len(data))
    return one_block(whole)


GOOD = bytes_of(ordinary(100))
BOMB = frame(bytes(1 << 30))
LYING = bytearray(frame(bytes(801)))
LYING[5:7] = struct.pack("<H", 800 - 256)
LYING_BOMB = bytearray(frame(bytes(1 << 29)))
assert LYING_BOMB[4] & 0xC0 == 0x80  # the size takes 4 bytes, after one of the window
LYING_BOMB[6:10] = struct.pack("<I", 1600)
FULL = bytes(100)
HOSTILE = {
    "no mark": (b"x" + GOOD[1:], "expected it to begin with b'dfxpack'"),
    "another version": (GOOD[:7] + b"\x09" + GOOD[8:], "expected version 1 of the format, found 9"),
    "other elements": (HEAD.pack(b"dfxpack", 1, 99) + GOOD[16:], "expected 100 elements, found 99"),
    "cut short": (GOOD[:-9], "expected blocks of"),
    "longer": (GOOD + b"x", "expected blocks of"),
    "a bomb": (
        one_block(block(1, BOMB)),
        "expected a frame of 1,549 to 1,649 bytes, found 1,073,741",
    ),
    "a bomb of planes": (
        one_block(block(3, BOMB)),
        "expected a frame of 400 to 800 bytes, found 1,073,741,824",
    ),
    "no size": (one_block(block(1, unsized(bytes(1 << 29)))), "1,649 bytes, found no size"),
    "a lying frame": (one_block(block(3, bytes(LYING))), "expected a whole frame of zstd"),
    "a lying bomb": (one_block(block(1, bytes(LYING_BOMB))), "expected a whole frame of zstd"),
    "half a frame": (one_block(GOOD[20:-9]), "expected a whole frame of zstd"),
    "more than a frame": (one_block(GOOD[20:] + b"xx"), "expected a whole frame of zstd"),
    "no frame": (one_block(block(1, b"")), "expected a whole frame of zstd"),
    "two frames": (
        one_block(block(1, frame(content(FULL)) + frame(b""))),
        "expected a whole frame of zstd",
    ),
    "no block": (one_block(b""), "expected 5 bytes or more, found 0"),
    "an unknown form": (one_block(block(7, b"abc")), "found 7 in 8 bytes"),
    "a bomb of exceptions": (
        with_frame(BOMB),
        "expected a frame of 14 to 814 bytes, found 1,073,7",
    ),
    "exceptions of no dtype": (
        with_frame(frame(b"\x04" + bytes(13))),
        "expected a dtype of exceptions from 0 to 3, found 4",
    ),
    "too few exceptions": (
        with_frame(frame(b"\x02\xff" + bytes(12))),
        "expected 32 bytes of exceptions, found 0",
    ),
    "exceptions longer than the block": (
        one_block(block(0x81, b"abc" + struct.pack("<I", 1 << 31))),
        "expected fewer than 3 bytes of exceptions, found 2,147,483,648",
    ),
    "no exceptions": (one_block(b"\x81"), "expected fewer than 0 bytes of exceptions, found 0"),
    "only bits": (
        one_block(struct.pack("<BI", 1, 1 << 31) + bytes(500)),
        "expected a whole frame of zstd",
    ),
    "bits of planes": (
        one_block(block(3, frame(bytes(800)), b"bits")),
        "expected no bits, found 4 bytes",
    ),
    "five planes": (
        one_block(block(3, frame(bytes(500)))),
        "expected 4 or 8 planes of 100 bytes, found 500",
    ),
    "too few symbols": (
        one_block(block(1, frame(content(FULL[1:])))),
        "expected 100 symbols, found 99",
    ),
    "too many symbols": (
        one_block(block(1, frame(content(FULL, flags=254)))),
        "expected 88 symbols, found 100",
    ),
    "a long element": (one_block(block(1, frame(content(FULL, lengths=25)))), "lengths up to 24"),
    "a long double": (one_block(block(2, frame(content(FULL, lengths=54)))), "lengths up to 53"),
    "a negative length": (one_block(block(1, frame(content(FULL, lengths=-1)))), "lengths up to"),
    "a large n": (one_block(block(1, frame(content(FULL, n=24)))), "n up to 23 or 64, found"),
    "too few bits": (
        one_block(block(1, frame(content(FULL, lengths=24)), bytes(299))),
        "expected 300 bytes of bits, found 299",
    ),
    "no bits": (
        one_block(block(1, frame(content(FULL, lengths=24)))),
        "expected 300 bytes of bits, found 0",
    ),
    "too many bits": (
        one_block(block(1, frame(content(FULL, lengths=7)), bytes(400))),
        "expected 88 bytes of bits, found 400",
    ),
    "doubles": (bytes_of(np.zeros(100)), "expected values of F32, found F64"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_are_not_trusted(tmp_path: Path, name: str) -> None:
    data, problem = HOSTILE[name]
    tensor = stored(tmp_path, data, "F32", (100,))
    with pytest.raises(CheckpointError) as caught:
        read_all(tensor)
    assert problem in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("name", [name for name in HOSTILE if "bomb" in name or "size" in name])
def test_a_bomb_takes_no_memory(tmp_path: Path, name: str) -> None:
    """Less than the bomb's content: more address space than that is not to be had."""
    tensor = stored(tmp_path, HOSTILE[name][0], "F32", (100,))
    with limited(timer=False), pytest.raises(CheckpointError):
        read_all(tensor)


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "problem"),
    [
        (GOOD, "I64", (100,), "expected a float dtype in the manifest, found 'I64'"),
        (GOOD, "F32", (1 << 60,), "expected 17,592,186,044,432 bytes or more"),
        (b"short", "F32", (1,), "expected 20 bytes or more for 1 elements, found 5"),
    ],
)
def test_a_description_is_not_trusted(
    tmp_path: Path, data: bytes, dtype: str, shape: Sequence[int], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        stored(tmp_path, data, dtype, shape)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_values_that_do_not_fit_are_refused(tmp_path: Path, dtype: str) -> None:
    data = bytes_of(np.array([1.0, 1.0000001], np.float32))
    with pytest.raises(CheckpointError, match=f"expected values of {dtype}, found F32"):
        read(stored(tmp_path, data, dtype, (2,)))


def test_a_plain_tensor_is_not_packed(tmp_path: Path) -> None:
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    spec = read_shard(tmp_path / "model.safetensors")["w"]
    with pytest.raises(CheckpointError, match="expected U8 of one dimension, found F32"):
        packed(spec, "F32", (3,))


def test_blocks_of_nothing() -> None:
    assert [blocks_of(count) for count in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]
