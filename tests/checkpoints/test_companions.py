import errno
import json
import os
import socket
import tracemalloc

import pytest

from diffxfer.checkpoints import companions
from diffxfer.checkpoints.companions import (
    companion_path,
    is_code,
    list_companions,
    read_bytes,
    read_config,
    read_object,
)
from diffxfer.errors import CompanionError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


def test_a_file_of_the_folder_is_given(folder):
    (folder / "config.json").write_text("{}")
    assert companion_path(folder, "config.json") == folder / "config.json"
    assert companion_path(folder, "tokenizer.json") is None


def test_a_link_within_the_folder_is_followed(folder):
    (folder / "LICENSE.txt").write_text("MIT")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    assert companion_path(folder, "LICENSE") == folder / "LICENSE"


def test_a_folder_that_is_itself_a_link_is_fine(folder, tmp_path):
    (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    assert read_config(tmp_path / "link") == {}


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (tmp_path / "id_rsa").write_text("secret")
    (folder / name).symlink_to("../id_rsa")
    with pytest.raises(CompanionError, match=f"{name}: points outside the checkpoint, to "):
        companion_path(folder, name)
    with pytest.raises(CompanionError, match="points outside the checkpoint"):
        list_companions(folder)


def test_a_linked_template_folder_out_of_the_checkpoint_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CompanionError, match="points outside the checkpoint"):
        list_companions(folder)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname"])
def test_a_name_cannot_lead_out(folder, tmp_path, name):
    (tmp_path / "outside.json").write_text("{}")
    with pytest.raises(CompanionError, match="points outside the checkpoint"):
        companion_path(folder, name)


@pytest.fixture
def snapshot(tmp_path):
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    path = repo / "snapshots" / "0123abc"
    path.mkdir(parents=True)
    (repo / "blobs" / "aa").write_text('{"a": 1}')
    (path / "config.json").symlink_to("../../blobs/aa")
    return path


def test_the_hubs_cache_links_into_its_own_blobs(snapshot):
    assert read_config(snapshot) == {"a": 1}
    (snapshot / "companions").mkdir()
    (snapshot / "companions" / "config.json").symlink_to("../../../blobs/aa")
    assert read_config(snapshot / "companions") == {"a": 1}


def test_a_snapshot_may_not_link_into_another_repository(snapshot):
    other = snapshot.parents[2] / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "bb").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(other / "bb")
    with pytest.raises(CompanionError, match="points outside the checkpoint"):
        companion_path(snapshot, "tokenizer.json")


def test_what_is_no_regular_file_is_refused_without_hanging(folder):
    os.mkfifo(folder / "config.json")
    (folder / "tokenizer.json").mkdir()
    (folder / "vocab.json").symlink_to("vocab.json")
    (folder / "merges.txt").symlink_to("missing")
    for name in ("config.json", "tokenizer.json"):
        with pytest.raises(CompanionError, match=f"{name}: is not a regular file"):
            companion_path(folder, name)
        with pytest.raises(CompanionError, match="is not a regular file"):
            read_bytes(folder / name)
    for name in ("vocab.json", "merges.txt"):
        with pytest.raises(CompanionError, match=f"{name}: is a broken link"):
            companion_path(folder, name)
    with pytest.raises(CompanionError, match="is not a regular file"):
        list_companions(folder)


def test_what_one_may_not_look_at_is_not_called_missing(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(folder), "lstat", refuse)
    with pytest.raises(CompanionError, match=r"config\.json: cannot be read \(Permission denied\)"):
        companion_path(folder, "config.json")


def test_a_fifo_that_comes_after_the_look_cannot_hang_us(folder, monkeypatch):
    os.mkfifo(folder / "config.json")
    (folder / "regular").write_text("")
    regular = (folder / "regular").stat()
    monkeypatch.setattr(type(folder), "stat", lambda *_, **__: regular)
    with pytest.raises(CompanionError, match="is not a regular file"):
        read_bytes(folder / "config.json")


def test_a_socket_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("LICENSE")
        with pytest.raises(CompanionError, match="is not a regular file"):
            list_companions(folder)


def test_a_missing_or_huge_file_is_an_error(folder, monkeypatch):
    with pytest.raises(CompanionError, match="cannot be read \\(No such file"):
        read_bytes(folder / "config.json")
    monkeypatch.setattr(companions, "MAX_COMPANION_BYTES", 8)
    (folder / "a.json").write_text("12345678")
    assert read_bytes(folder / "a.json") == b"12345678"
    (folder / "a.json").write_text("123456789")
    with pytest.raises(CompanionError, match="has 9 bytes, but a companion has at most 8"):
        read_bytes(folder / "a.json")


def test_a_small_file_takes_little_memory(folder):
    (folder / "a.json").write_text("{}")
    tracemalloc.start()
    try:
        assert read_bytes(folder / "a.json") == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"is not JSON \(line 1\): Expecting value"),
        (b'{\n"a": 1,\nb}', r"is not JSON \(line 3\): Expecting property name"),
        (b'{"a": 1} {}', r"is not JSON \(line 1\): Extra data"),
        (b'{\n"a": "\xff"}', r"is not JSON \(line 2\): not UTF-8"),
        (b"\xef\xbb\xbf{}", r"is not JSON \(line 1\): Unexpected UTF-8 BOM"),
        (b'{"a": "\\ud800"}', "is not JSON: an unpaired surrogate"),
        (b'{"\\uDC00": 1}', "is not JSON: an unpaired surrogate"),
        (b"[" * 100_000, "is not JSON: nested too deeply"),
        (b"[" * 65 + b"]" * 65, "is not JSON: nested too deeply"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "is not JSON: nested too deeply"),
        (b"1" * 5000, "is not JSON: an integer of 5000 digits"),
        (b"-" + b"1" * 100_000, "is not JSON: an integer of 100001 digits"),
    ],
)
def test_what_is_no_json_is_said_with_its_line(folder, raw, message):
    (folder / "a.json").write_bytes(raw)
    with pytest.raises(CompanionError, match=f"a.json: {message}.*; download or save"):
        read_object(folder / "a.json")


def test_what_real_files_hold_is_read(folder):
    text = '{"a": "\\ud83d\\ude00", "b": [0.0, Infinity], "c": 1000000000000000019884624838656}'
    (folder / "a.json").write_text(text)
    document = read_object(folder / "a.json")
    assert document == {"a": "😀", "b": [0.0, float("inf")], "c": 1000000000000000019884624838656}


def test_an_object_is_required(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CompanionError, match="is a JSON array, expected an object"):
        read_object(folder / "config.json")
    (folder / "config.json").write_text("1.5")
    with pytest.raises(CompanionError, match="is a JSON number"):
        read_config(folder)


def test_a_folder_without_config_is_no_checkpoint(folder):
    with pytest.raises(
        CompanionError, match=r"checkpoint: has no config\.json, so it is not a checkpoint; give"
    ):
        read_config(folder)


def test_companions_are_carried_and_the_rest_is_named(folder):
    carried = [
        "LICENSE", "License.md", "NOTICE.txt", "USE_POLICY.md", "added_tokens.json",
        "audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json",
        "config.json", "generation_config.json", "merges.txt", "modeling_x.py",
        "preprocessor_config.json", "processor_config.json", "qwen.tiktoken",
        "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json",
        "vocab.json", "vocab.txt",
    ]  # fmt: skip
    left_out = [
        ".gitattributes", "adapter_config.json", "all_results.json", "consolidated.00.pth",
        "consolidated.safetensors", "license.bin", "model.gguf", "model.onnx", "optimizer.pt",
        "photo.png", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
        "rng_state_0.pth", "scheduler.pt", "tf_model.h5", "trainer_state.json",
        "training_args.bin",
    ]  # fmt: skip
    made_anew = [
        "README.md", "diffxfer.json", "model-00001-of-00002.safetensors", "model.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    for name in (*carried, *left_out, *made_anew):
        (folder / name).write_text("{}")
    for name in ("original", ".git", "LICENSES", "additional_chat_templates"):
        (folder / name).mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("")
    (folder / "additional_chat_templates" / "notes.txt").write_text("")
    (folder / "original" / "params.json").write_text("{}")
    names, others = list_companions(folder)
    assert names == tuple(sorted([*carried, "additional_chat_templates/tools.jinja"]))
    folders = [".git/", "LICENSES/", "original/", "additional_chat_templates/notes.txt"]
    assert others == tuple(sorted([*left_out, *folders]))
    assert [name for name in names if is_code(name)] == ["modeling_x.py"]


def test_hostile_names_are_left_out_and_escaped(folder):
    for name in (b"a\nb.json", b"\x1b[31mred.txt", b"\xff.json", "é.json".encode()):
        (folder / os.fsdecode(name)).write_text("{}")
    names, left_out = list_companions(folder)
    assert names == ("é.json",)
    assert left_out == ("\\udcff.json", "\\x1b[31mred.txt", "a\\nb.json")
    json.dumps(left_out).encode()


def test_a_missing_folder_is_an_error(folder):
    with pytest.raises(CompanionError, match="cannot be listed"):
        list_companions(folder / "no")
