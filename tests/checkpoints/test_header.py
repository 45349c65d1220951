"""safetensors headers: invalid ones are refused, valid ones read; the layout is `save_file`'s."""

from __future__ import annotations

import itertools
import json
import re
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from diffxfer.checkpoints.header import MAX_HEADER_BYTES
from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.stored import BITS
from diffxfer.errors import HeaderError
from tests.helpers import DTYPES, raw_shard, read_specs, to_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

Entry = dict[str, Any]


def entry(begin: int, end: int, shape: tuple[int, ...] | None = None, dtype: str = "U8") -> Entry:
    size = [end - begin] if shape is None else list(shape)
    return {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}


def with_entry(**changes: Any) -> bytes:
    return raw_shard({"weird": {**entry(0, 4), **changes}}, b"1234")


ONE = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "has only 7 bytes"),
    "no header": (struct.pack("<Q", 0), "not a JSON object"),
    "longer than allowed": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "at most 100000000"),
    "absurdly long": (b"\xff" * 8, "at most 100000000"),
    "longer than the file": (raw_shard(b"{}", length=3), "is truncated"),
    "not JSON": (raw_shard(b"{nonsense}"), "is not JSON"),
    "not UTF-8": (raw_shard(b'{"\xff":1}'), "is not JSON"),
    "UTF-16": (raw_shard('{"a":1}'.encode("utf-16")), "not a JSON object"),
    "a list": (raw_shard([]), "not a JSON object"),
    "leading space": (raw_shard(b" {}"), "not a JSON object"),
    "two documents": (raw_shard(b"{}{}"), "is not JSON"),
    "a control character": (raw_shard(b'{"a\nb":' + ONE + b"}", b"1"), "is not JSON"),
    "deep lists": (raw_shard(b'{"weird":' + b"[" * 100_000), "is not JSON"),
    "deep objects": (raw_shard(b'{"a":' * 100_000), "is not JSON"),
    "an integer of many digits": (
        raw_shard(b'{"weird":{"shape":[' + b"9" * 5000 + b"]}}"),
        "is not JSON",
    ),
    "metadata that are no object": (raw_shard({"__metadata__": ["pt"]}), "not a map of strings"),
    "metadata with a number": (raw_shard({"__metadata__": {"a": 1}}), "not a map of strings"),
    "metadata with null": (raw_shard({"__metadata__": {"a": None}}), "not a map of strings"),
    "metadata with an object": (raw_shard({"__metadata__": {"a": {}}}), "not a map of strings"),
    "a key twice": (
        raw_shard(b'{"weird":' + ONE + b',"weird":' + ONE + b"}", b"1"),
        "names 'weird' twice",
    ),
    "a key twice, once escaped": (
        raw_shard(b'{"weird":' + ONE + b',"w\\u0065ird":' + ONE + b"}", b"1"),
        "names 'weird' twice",
    ),
    "a field twice": (
        raw_shard(b'{"weird":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "names 'dtype' twice",
    ),
    "trailing bytes": (raw_shard({"weird": entry(0, 4)}, b"12345"), "1 bytes that belong to no"),
    "only trailing bytes": (raw_shard({}, b"1"), "1 bytes that belong to no"),
}
"""Faults of a file, and the words in the error for each."""

TENSOR_LIES: dict[str, tuple[bytes, str]] = {
    "no entry": (raw_shard({"weird": None}), "must have exactly"),
    "an entry without a shape": (
        raw_shard({"weird": {"dtype": "U8", "data_offsets": [0, 0]}}),
        "must have exactly",
    ),
    "an unknown field": (with_entry(strides=[1]), "must have exactly"),
    "an unknown dtype": (with_entry(dtype="U7"), "unknown dtype 'U7'"),
    "a dtype in lower case": (with_entry(dtype="u8"), "unknown dtype 'u8'"),
    "a dtype that is a list": (with_entry(dtype=["U8"]), r"unknown dtype \['U8'\]"),
    "a shape that is a number": (with_entry(shape=4), "has shape 4"),
    "a negative size": (with_entry(shape=[-4]), "has shape"),
    "two negative sizes": (with_entry(shape=[-2, -2]), "has shape"),
    "a float size": (with_entry(shape=[4.0]), "has shape"),
    "a boolean size": (with_entry(shape=[4, True]), "has shape"),
    "a size that is a string": (with_entry(shape=["4"]), "has shape"),
    "a size of 2**63": (with_entry(shape=[1 << 63, 0]), "has shape"),
    "65 dimensions": (with_entry(shape=[4] + [1] * 64), "at most 64 sizes"),
    "a shape of deep lists": (
        raw_shard(
            b'{"weird":{"dtype":"U8","data_offsets":[0,0],"shape":'
            + b"[" * 900
            + b"]" * 900
            + b"}}"
        ),
        "has shape|is not JSON",
    ),
    "offsets that are a number": (with_entry(data_offsets=4), "has the data_offsets 4"),
    "one offset": (with_entry(data_offsets=[0]), "has the data_offsets"),
    "three offsets": (with_entry(data_offsets=[0, 4, 8]), "has the data_offsets"),
    "a negative offset": (with_entry(data_offsets=[-4, 0]), "has the data_offsets"),
    "a float offset": (with_entry(data_offsets=[0, 4.0]), "has the data_offsets"),
    "a boolean offset": (with_entry(data_offsets=[False, 4]), "has the data_offsets"),
    "an infinite offset": (with_entry(data_offsets=[0, float("inf")]), "has the data_offsets"),
    "backwards": (with_entry(data_offsets=[4, 0]), "ends at 0, before it begins at 4"),
    "fewer bytes than the shape": (with_entry(shape=[5]), "has 4 bytes, but U8 of shape"),
    "more bytes than the shape": (with_entry(shape=[]), "takes 1 bytes"),
    "another dtype's bytes": (with_entry(dtype="F64"), "takes 32 bytes"),
    "half a byte": (with_entry(dtype="F4", shape=[7]), "has 4 bytes"),
    "a product beyond 64 bits": (with_entry(shape=[1 << 62] * 64), "more bytes than any file"),
    "past the end": (raw_shard({"weird": entry(0, 5)}, b"1234"), "is truncated"),
    "far past the end": (raw_shard({"weird": entry(0, 1 << 62)}, b"1234"), "is truncated"),
    "a hole in front": (raw_shard({"weird": entry(1, 4)}, b"1234"), "hole of 1 bytes before"),
    "a hole": (raw_shard({"a": entry(0, 1), "weird": entry(2, 4)}, b"1234"), "hole after 'a'"),
    "an overlap": (raw_shard({"a": entry(0, 3), "weird": entry(2, 4)}, b"1234"), "overlaps 'a'"),
    "one place for two": (
        raw_shard({"a": entry(0, 4), "weird": entry(0, 4)}, b"1234"),
        "overlaps 'a'",
    ),
    "an empty tensor inside another": (
        raw_shard({"weird": entry(0, 4), "a": entry(2, 2)}, b"1234"),
        "overlaps 'weird'",
    ),
}
"""Faults of the tensor `weird`, and the words in the error for each."""


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "model-00007-of-00009.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_specs(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    content, words = LIES[lie]
    assert words in refusal(tmp_path, content)


@pytest.mark.parametrize("lie", TENSOR_LIES)
def test_a_tensor_that_lies_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    content, words = TENSOR_LIES[lie]
    message = refusal(tmp_path, content)
    assert re.search(words, message)
    assert "'weird'" in message or "is not JSON" in message


@pytest.mark.parametrize("depth", range(100, 1100, 23))
def test_no_depth_of_json_breaks_the_message(tmp_path: Path, depth: int) -> None:
    shape = b"[" * depth + b"]" * depth
    fields = b'"dtype":"U8","data_offsets":[0,0],"shape":' + shape
    refusal(tmp_path, raw_shard(b'{"weird":{' + fields + b"}}"))


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_no_name(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, raw_shard({name: entry(0, 1)}, b"1"))
    assert "not valid Unicode" in message
    message.encode()


def test_names_are_escaped_and_shortened_in_messages(tmp_path: Path) -> None:
    name = "\x1b[31m\n" + "x" * 10_000
    message = refusal(tmp_path, raw_shard({name: entry(0, 1, dtype="U7")}, b"1"))
    assert r"\x1b[31m\n" in message


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (MAX_HEADER_BYTES + 1, 1 << 63, MAX_HEADER_BYTES):
        path.write_bytes(raw_shard(b"{}", length=length))
        tracemalloc.start()
        try:
            with pytest.raises(HeaderError):
                read_specs(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1 << 20


def test_a_header_longer_than_allowed_is_refused_even_if_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: takes no disk
    with pytest.raises(HeaderError, match="at most 100000000"):
        read_specs(path)


def test_the_longest_header_is_read_in_a_few_times_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    head = b'{"a":' + ONE + b"}"
    path.write_bytes(raw_shard(head + b" " * (MAX_HEADER_BYTES - len(head)), b"1"))
    tracemalloc.start()
    try:
        assert list(read_specs(path)) == ["a"]
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


TRUTHS = {
    "an empty header": raw_shard({}),
    "metadata alone": raw_shard({"__metadata__": {"format": "pt", "é": "\n"}}),
    "padding": raw_shard(b"{}" + b" " * 30),
    "other white space": raw_shard(b'{ "a" :\n\t' + ONE + b"}\r\n", b"1"),
    "no padding": raw_shard(b'{"a":' + ONE + b"}", b"1"),
    "any order": raw_shard({"b": entry(3, 4), "a": entry(0, 3)}, b"1234"),
    "unaligned": raw_shard({"a": entry(0, 3), "b": entry(3, 11, (2,), "F32")}, b"x" * 11),
    "a scalar": raw_shard({"a": entry(0, 8, (), "F64")}, b"x" * 8),
    "64 dimensions": raw_shard({"a": entry(0, 4, (4,) + (1,) * 63)}, b"1234"),
    "empty tensors": raw_shard(
        {
            "a": entry(0, 0, (0,)),
            "b": entry(0, 2),
            "c": entry(2, 2, (3, 0, 1 << 60)),
            "d": entry(2, 3),
        },
        b"123",
    ),
    "only empty tensors": raw_shard({"a": entry(0, 0, (0,)), "b": entry(0, 0, (0, 5))}),
    "elements of four bits": raw_shard({"a": entry(0, 2, (4,), "F4")}, b"12"),
    "the empty name": raw_shard({"": entry(0, 1)}, b"1"),
    "a surrogate pair": raw_shard({"\U0001f600": entry(0, 1)}, b"1"),
}


@pytest.mark.parametrize("truth", TRUTHS)
def test_what_safetensors_accepts_is_read_alike(tmp_path: Path, truth: str) -> None:
    content = TRUTHS[truth]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    theirs = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(content)}
    ours = {
        name: (spec.dtype, list(spec.shape), content[spec.start : spec.start + spec.nbytes])
        for name, spec in read_specs(path).items()
    }
    assert ours == theirs


def deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    return safetensors.deserialize(content)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_size_that_safetensors_gives_it(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    size = 8 * BITS[dtype] // 8
    for count in range(7, 10):
        content = raw_shard({"a": entry(0, size, (count,), dtype)}, b"x" * size)
        path.write_bytes(content)
        assert is_read(path) == is_deserialized(content) == (count == 8)


def is_read(path: Path) -> bool:
    try:
        read_specs(path)
    except HeaderError:
        return False
    return True


def is_deserialized(content: bytes) -> bool:
    try:
        deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


small = st.integers(-1, 6)
entries = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F16", "F4", "U7"]),
            "shape": st.lists(small, max_size=2),
            "data_offsets": st.lists(small, min_size=2, max_size=2),
        }
    ),
    max_size=4,
)


@settings(max_examples=300)
@given(entries, st.integers(0, 6))
def test_refuses_exactly_what_safetensors_refuses(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Entry], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "differential.safetensors"
    content = raw_shard(header, b"x" * size)
    path.write_bytes(content)
    assert is_read(path) == is_deserialized(content)


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_cuts_in_any_order_are_read_and_a_moved_one_is_not(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], random: Any, move: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "cuts.safetensors"
    begins = [0, *itertools.accumulate(sizes)]
    cuts = [entry(begin, begin + size) for begin, size in zip(begins, sizes, strict=False)]
    if move:
        moved = random.choice(cuts)
        moved["data_offsets"] = [offset + 1 for offset in moved["data_offsets"]]
    names = [f"t{index}" for index in range(len(cuts))]
    random.shuffle(names)
    header = dict(sorted(zip(names, cuts, strict=True)))
    content = raw_shard(header, b"x" * sum(sizes))
    path.write_bytes(content)
    assert is_read(path) == is_deserialized(content)
    assert move or is_read(path)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_byte_is_refused_or_read_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = save({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)})
    at = data.draw(st.integers(0, len(whole) - 1))
    content = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    if is_read(path):
        assert is_deserialized(content)


# How they are laid out.


def laid_out(tensors: Mapping[str, Tensor]) -> bytes:
    """A file that is written as our layout says."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"} | {
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
        torch.complex64: "C64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
    }
    layout = layout_shard((n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items())
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    for name, tensor in tensors.items():
        data = to_bytes(tensor)
        content[layout.starts[name] : layout.starts[name] + len(data)] = data
    return bytes(content)


ODD = {
    "model.layers.10.w": torch.arange(6.0).reshape(2, 3),
    "model.layers.2.w": torch.arange(6.0).reshape(3, 2),
    "Model.layers.1.w": torch.ones(1),
    "bf16": torch.arange(3).to(torch.bfloat16),
    "f16": torch.arange(5).to(torch.float16),
    "f64": torch.arange(5).to(torch.float64),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 7),
    "empty, too": torch.empty(0, dtype=torch.float64),
    "i64": torch.arange(4),
    "i32": torch.arange(3).to(torch.int32),
    "i16": torch.arange(3).to(torch.int16),
    "i8": torch.arange(3).to(torch.int8),
    "u8": torch.arange(3).to(torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "experts": torch.arange(24.0).reshape(2, 3, 4).to(torch.bfloat16),
    "f8": torch.ones(3).to(torch.float8_e4m3fn),
    "f8 2": torch.ones(3).to(torch.float8_e5m2),
    "c64": torch.ones(3, dtype=torch.complex64),
    "größe": torch.ones(1),
    "层": torch.ones(1),
    "\U0001f600 beyond": torch.ones(1),
    "\uffff before": torch.ones(1),
    'quote " and \\ and /': torch.ones(1),
    "".join(map(chr, range(0x20))): torch.ones(1),
    "\x7f\x80\x9f\u2028": torch.ones(1),
    "": torch.ones(1),
}


def test_the_layout_of_odd_tensors_is_that_of_save_file(tmp_path: Path) -> None:
    save_file(ODD, tmp_path / "theirs", metadata={"format": "pt"})
    assert laid_out(ODD) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("name", ODD)
def test_the_layout_of_a_single_tensor_is_that_of_save_file(name: str) -> None:
    assert laid_out({name: ODD[name]}) == save({name: ODD[name]}, metadata={"format": "pt"})


def test_the_layout_of_nothing_is_that_of_save_file() -> None:
    assert laid_out({}) == save({}, metadata={"format": "pt"})


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.tuples(
            st.sampled_from([*DTYPES.values(), torch.int64, torch.bool, torch.uint8]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=8,
    )
)
def test_the_layout_of_any_tensors_is_that_of_save_file(
    described: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    described.pop("__metadata__", None)
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for name, (dtype, shape) in described.items()
    }
    assert laid_out(tensors) == save(tensors, metadata={"format": "pt"})


def test_a_layout_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(laid_out(ODD))
    specs = read_specs(path)
    layout = layout_shard((spec.name, spec.dtype, spec.shape) for spec in specs.values())
    assert layout.starts == {name: spec.start for name, spec in specs.items()}
    assert layout.size == path.stat().st_size
    assert json.loads(layout.header[8:])["__metadata__"] == {"format": "pt"}


def test_many_tensors_take_no_quadratic_time(tmp_path: Path) -> None:
    layout = layout_shard((f"layers.{index}.w", "U8", (1,)) for index in range(50_000))
    path = tmp_path / "model.safetensors"
    path.write_bytes(layout.header + b"x" * 50_000)
    assert len(read_specs(path)) == 50_000
