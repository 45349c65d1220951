"""Which tensors a folder has, what is refused as one, and inputs that change during a run."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffxfer.checkpoints.files import OpenShard, check_unchanged, same_values
from diffxfer.checkpoints.reader import open_checkpoint, open_weights
from diffxfer.checkpoints.shard_index import INDEX_NAME, SINGLE_SHARD
from diffxfer.errors import (
    CheckpointError,
    CompanionError,
    HeaderError,
    InputChangedError,
    ShardIndexError,
)
from tests.helpers import open_files, raw_shard, read_specs, save_shard, to_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

A = {"a": torch.arange(4.0)}
B = {"b": torch.arange(3).to(torch.bfloat16)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path, *, weight_map: Any = None) -> Path:
    """A checkpoint of two shards; the index may be another than the true one."""
    save_shard(folder / FIRST, A)
    save_shard(folder / SECOND, B)
    (folder / "config.json").write_text("{}")
    write_index(folder, {"a": FIRST, "b": SECOND} if weight_map is None else weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def single(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    save_shard(folder / SINGLE_SHARD, A if tensors is None else tensors)
    (folder / "config.json").write_text("{}")
    return folder


def message(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_single_shard(tmp_path: Path) -> None:
    found = open_checkpoint(single(tmp_path), "base")
    assert found.role == "base"
    assert found.config == {}
    assert not found.weights.indexed
    assert [shard.path.name for shard in found.weights.shards] == [SINGLE_SHARD]
    spec = found.tensors["a"]
    assert (spec.dtype, spec.shape, spec.nbytes) == ("F32", (4,), 16)


def test_an_index(tmp_path: Path) -> None:
    weights = open_weights(sharded(tmp_path))
    assert weights.indexed
    assert [shard.path.name for shard in weights.shards] == [FIRST, SECOND]
    assert {name: spec.shard.path.name for name, spec in weights.tensors.items()} == {
        "a": FIRST,
        "b": SECOND,
    }


def test_an_index_of_one_shard_of_the_single_name(tmp_path: Path) -> None:
    write_index(single(tmp_path), {"a": SINGLE_SHARD})
    assert open_weights(tmp_path).indexed


def test_what_lies_outside_the_index_is_not_read(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"stale and broken")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert open_weights(tmp_path).tensors.keys() == {"a", "b"}


def test_what_lies_beside_a_single_shard_is_not_read(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / FIRST).write_bytes(b"stale and broken")
    assert open_weights(tmp_path).tensors.keys() == {"a"}


def test_both_a_single_shard_and_an_index_is_ambiguous(tmp_path: Path) -> None:
    save_shard(sharded(tmp_path) / SINGLE_SHARD, A)
    with pytest.raises(
        ShardIndexError, match=r"has both model\.safetensors and an index"
    ) as caught:
        open_weights(tmp_path)
    assert str(tmp_path) in message(caught)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": 1}, "places 'a' in 1"),
        ({"a": None}, "places 'a' in None"),
        ({"a": {"x": [1] * 5000}}, "places 'a' in {'x': "),
        ({"a": "pytorch_model.bin"}, "which is not a safetensors file"),
        ({"a": "../x/model.safetensors"}, "outside its own folder"),
        ({"a": "/etc/model.safetensors"}, "outside its own folder"),
        ({"a": "sub/model.safetensors"}, "outside its own folder"),
        ({"a": "x\0.safetensors"}, "outside its own folder"),
        ({"a": FIRST, "b": FIRST}, f"places 'b' in {FIRST}, which lacks it"),
        ({"a": SECOND, "b": FIRST}, f"places 'b' in {FIRST}, which lacks it"),
        ({"b": SECOND, "c": SECOND}, f"places 'c' in {SECOND}, which lacks it"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    sharded(tmp_path, weight_map=weight_map)
    with pytest.raises(ShardIndexError) as caught:
        open_weights(tmp_path)
    text = message(caught)
    assert words in text
    assert str(tmp_path / INDEX_NAME) in text
    assert len(text) < 1000


def test_a_tensor_that_the_index_does_not_place_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_shard(tmp_path / SECOND, B | {"stray": torch.ones(1)})
    with pytest.raises(ShardIndexError, match=f"does not list 'stray', which is in {SECOND}"):
        open_weights(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_shard(tmp_path / SECOND, A | B)
    with pytest.raises(ShardIndexError, match=f"does not list 'a', which is in {SECOND}"):
        open_weights(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    with pytest.raises(ShardIndexError, match="is missing") as caught:
        open_weights(tmp_path)
    assert str(tmp_path / SECOND) in message(caught)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b'{"weight_map": {"a": "\\ud800"}}']
)
def test_an_index_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (sharded(tmp_path) / INDEX_NAME).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert str(tmp_path / INDEX_NAME) in message(caught)


def test_a_name_too_long_for_the_file_system(tmp_path: Path) -> None:
    sharded(tmp_path, weight_map={"a": "x" * 1000 + ".safetensors"})
    with pytest.raises(HeaderError, match="cannot be opened"):
        open_weights(tmp_path)


# Files that are not shards.


@pytest.mark.parametrize("name", [SINGLE_SHARD, FIRST])
def test_a_fifo_as_a_shard_is_refused_at_once(tmp_path: Path, name: str) -> None:
    if name == FIRST:
        sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(HeaderError, match="is not a regular file") as caught:
        open_weights(tmp_path)
    assert str(tmp_path / name) in message(caught)


def test_a_device_or_a_folder_as_a_shard_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / SINGLE_SHARD
    shard.symlink_to("/dev/zero")
    with pytest.raises(HeaderError, match="is not a regular file"):
        open_weights(tmp_path)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(HeaderError, match="is not a regular file"):
        open_weights(tmp_path)


def test_a_fifo_as_an_index_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / INDEX_NAME)
    with pytest.raises(CompanionError, match="is not a regular file"):
        open_weights(tmp_path)


def test_a_link_to_a_shard_is_followed(tmp_path: Path) -> None:
    save_shard(tmp_path / "blobs" / "0123", A)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / SINGLE_SHARD).symlink_to("../blobs/0123")
    found = open_checkpoint(folder, "base")
    assert found.weights.shards[0].path == folder / SINGLE_SHARD


def test_links_to_nothing_and_to_themselves_are_named(tmp_path: Path) -> None:
    shard = tmp_path / SINGLE_SHARD
    shard.symlink_to("nowhere")
    with pytest.raises(ShardIndexError, match="is a broken link"):
        open_weights(tmp_path)
    shard.unlink()
    shard.symlink_to(SINGLE_SHARD)
    with pytest.raises(HeaderError, match="cannot be opened"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.pth", "x.ckpt"]
)
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=f"only pickled weights \\({name}\\)"):
        open_checkpoint(tmp_path, "base")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_lora_adapter_is_to_be_merged_first(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter .*; merge it into its base"):
        open_checkpoint(tmp_path, "finetuned")


def test_an_adapter_beside_a_whole_model_is_left_alone(tmp_path: Path) -> None:
    (single(tmp_path) / "adapter_config.json").write_text("{}")
    open_checkpoint(tmp_path, "finetuned")


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found none"):
        open_checkpoint(tmp_path, "base")
    save_shard(tmp_path / "other.safetensors", A)
    with pytest.raises(CheckpointError, match=r"found only other\.safetensors"):
        open_checkpoint(tmp_path, "base")


def test_a_device_is_refused_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / SINGLE_SHARD
    path.symlink_to("/dev/null")
    opened = []
    real_open = os.open

    def spy(name: Path, *rest: Any) -> int:
        opened.append(name)
        return real_open(name, *rest)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(HeaderError, match="is not a regular file"):
        open_weights(tmp_path)
    assert path not in opened


def test_a_model_without_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SINGLE_SHARD).write_bytes(raw_shard({}))
    assert open_weights(tmp_path).tensors == {}  # as a diff vector of nothing
    with pytest.raises(CheckpointError, match="has no tensors") as caught:
        open_checkpoint(tmp_path, "base")
    assert str(tmp_path / SINGLE_SHARD) in message(caught)


def test_no_folder_is_refused_by_role(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(CheckpointError, match="expected the target checkpoint"):
            open_checkpoint(tmp_path / name, "target")


def test_no_config_is_refused(tmp_path: Path) -> None:
    (single(tmp_path) / "config.json").unlink()
    with pytest.raises(CompanionError, match=r"no config\.json"):
        open_checkpoint(tmp_path, "base")


def test_a_shard_that_lies_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).write_bytes(raw_shard({}, b"rest"))
    with pytest.raises(HeaderError) as caught:
        open_weights(tmp_path)
    assert str(tmp_path / SECOND) in message(caught)


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    sharded(tmp_path)
    before = open_files()
    open_weights(tmp_path)
    (tmp_path / SECOND).write_bytes(b"")
    with pytest.raises(HeaderError):
        open_weights(tmp_path)
    (tmp_path / SECOND).unlink()
    os.mkfifo(tmp_path / SECOND)
    with pytest.raises(HeaderError):
        open_weights(tmp_path)
    assert open_files() == before


# Reading, and inputs that change.


def test_reads_any_part(tmp_path: Path) -> None:
    spec = save_shard(tmp_path / SINGLE_SHARD, A)["a"]
    shard = OpenShard(spec.shard)
    buffer = bytearray(8)
    shard.read_into(memoryview(buffer), spec.start + 4)
    assert bytes(buffer) == to_bytes(A["a"])[4:12]
    shard.read_into(memoryview(bytearray()), spec.start)


def test_a_disk_that_fails_is_told_from_an_input_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = save_shard(tmp_path / SINGLE_SHARD, A)["a"]
    shard = OpenShard(spec.shard)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError) as caught:
        shard.read_into(memoryview(bytearray(8)), 100)
    assert type(caught.value) is CheckpointError
    path = tmp_path / SINGLE_SHARD
    assert message(caught) == (
        f"{path}: cannot be read at byte 100 (Input/output error); check the disk"
    )


def test_an_open_shard_is_closed_with_its_last_reference(tmp_path: Path) -> None:
    spec = save_shard(tmp_path / SINGLE_SHARD, A)["a"]
    before = open_files()
    shard = OpenShard(spec.shard)
    assert open_files() == before + 1
    del shard
    assert open_files() == before


def test_an_input_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_SHARD
    shard = save_shard(path, A)["a"].shard
    check_unchanged(shard)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    for look in (check_unchanged, OpenShard):
        with pytest.raises(InputChangedError, match="changed while it was read") as caught:
            look(shard)
        assert str(path) in message(caught)


def test_an_input_of_another_size_or_inode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_SHARD
    shard = save_shard(path, A)["a"].shard
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputChangedError):
        check_unchanged(shard)
    other = tmp_path / "other"
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    with pytest.raises(InputChangedError):
        check_unchanged(shard)


def test_an_input_that_vanished_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_SHARD
    shard = save_shard(path, A)["a"].shard
    path.unlink()
    for look in (check_unchanged, OpenShard):
        with pytest.raises(InputChangedError, match="vanished while it was read"):
            look(shard)


def test_an_input_that_became_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_SHARD
    spec = save_shard(path, A)["a"]
    shard = OpenShard(spec.shard)
    os.truncate(path, spec.start + 6)
    with pytest.raises(InputChangedError, match="was truncated while"):
        shard.read_into(memoryview(bytearray(8)), spec.start)


# Comparing tensors.


def test_same_values_tells_every_bit(tmp_path: Path) -> None:
    ones = torch.ones((1 << 20) + 3, dtype=torch.uint8)
    last = ones.clone()
    last[-1] = 2
    tensors = {"a": ones, "b": ones.clone(), "last": last, "flat": ones.reshape(1, -1).clone()}
    tensors |= {"zero": torch.zeros(2), "minus": -torch.zeros(2), "none": torch.empty(0)}
    specs = save_shard(tmp_path / SINGLE_SHARD, tensors)
    assert same_values(specs["a"], specs["b"])
    assert same_values(specs["none"], specs["none"])
    assert not same_values(specs["a"], specs["last"])
    assert not same_values(specs["a"], specs["flat"])
    assert not same_values(specs["zero"], specs["minus"])
    other = save_shard(tmp_path / "other", {"a": ones.to(torch.int8)})["a"]
    assert not same_values(specs["a"], other)


def test_same_values_minds_changes(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_SHARD
    old = save_shard(path, A)["a"]
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputChangedError):
        same_values(old, read_specs(path)["a"])
