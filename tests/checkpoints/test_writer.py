"""A folder appears complete or not at all, and only folders of diffxfer are ever replaced."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from diffxfer.checkpoints import filesystem, writer
from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.output_place import (
    MANIFEST_NAME,
    free_bytes,
    is_our_folder,
    refuse_small_disk,
    refuse_unsafe_output,
)
from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.checkpoints.writer import OutputFolder, index_json
from diffxfer.errors import DiskSpaceError, OutputError, OutputExistsError
from tests.helpers import open_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOB, OTHER_JOB = "0123456789abcdef" * 2, "fedcba9876543210" * 2
OURS = b'{\n "diffxfer_format": 1, "files": {"text": {}, "stale": {}, "weights": {}}}'


def write(out: Path, text: str = "new", *, overwrite: bool = False, job: str = JOB) -> None:
    """Make a small folder as diffxfer does."""
    with OutputFolder(out, job, overwrite=overwrite) as folder:
        folder.write_file("text", text.encode())
        folder.write_file(MANIFEST_NAME, OURS)
        folder.publish()


def tree(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def text_of(out: Path) -> str:
    return (out / "text").read_text()


# Where an output may be.


def test_a_new_place_is_fine(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    refuse_unsafe_output(tmp_path / "out", [tmp_path / "in"], overwrite=False)
    refuse_unsafe_output(tmp_path / "in-2", [tmp_path / "in"], overwrite=False)
    refuse_unsafe_output(tmp_path / "x" / "y" / "out", [tmp_path / "in"], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("in", "is the input"),
        ("in/", "is the input"),
        ("link", "is the input"),
        ("x/../in", "is the input"),
        ("in/out", "is inside the input"),
        ("link/out", "is inside the input"),
        ("in/x/y/out", "is inside the input"),
        (".", "contains the input"),
        ("around", "contains the input"),
        ("in/file", "is the input"),
        ("blobs", "contains the input"),
    ],
)
def test_an_input_is_never_touched(tmp_path: Path, out: str, words: str, overwrite: bool) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").touch()
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "around").symlink_to(".")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").touch()
    (tmp_path / "in" / "shard").symlink_to("../blobs/0123")
    inputs = [tmp_path / "in", tmp_path / "in" / "shard", tmp_path / "in" / "file"]
    if out == "in/file":
        inputs = inputs[2:]
    with pytest.raises(OutputExistsError, match=words) as caught:
        refuse_unsafe_output(tmp_path / out, inputs, overwrite=overwrite)
    assert "\n" not in str(caught.value)


def test_an_input_behind_a_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(OutputExistsError, match="is inside the input"):
        refuse_unsafe_output(tmp_path / "in" / "out", [tmp_path / "link"], overwrite=False)


def make(kind: str, out: Path) -> None:
    if kind == "folder":
        out.mkdir()
        (out / "precious").touch()
    elif kind == "file":
        out.touch()
    elif kind == "link to nothing":
        out.symlink_to("nowhere")
    elif kind == "link to itself":
        out.symlink_to(out.name)
    elif kind == "link to a folder of ours":
        write(out.parent / "real")
        out.symlink_to("real")
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "fifo as manifest":
        out.mkdir()
        os.mkfifo(out / MANIFEST_NAME)
    elif kind == "another's manifest":
        out.mkdir()
        (out / MANIFEST_NAME).write_text('{"format": 1}')
    elif kind == "manifest that is a folder":
        (out / MANIFEST_NAME).mkdir(parents=True)


FOREIGN = [
    "folder",
    "file",
    "link to nothing",
    "link to itself",
    "link to a folder of ours",
    "fifo",
    "fifo as manifest",
    "another's manifest",
    "manifest that is a folder",
]


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    make(kind, out)
    with pytest.raises(OutputExistsError, match="exists already"):
        refuse_unsafe_output(out, [], overwrite=False)
    with pytest.raises(OutputExistsError, match=r"is not a folder|no diffxfer\.json by diffxfer"):
        refuse_unsafe_output(out, [], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_appears_while_we_work_is_never_replaced(
    tmp_path: Path, kind: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, JOB, overwrite=overwrite) as folder:
        folder.write_file("text", b"new")
        make(kind, out)
        partial = folder.partial.name
        before = tree(tmp_path) - {partial, f"{partial}/text", f"{partial}/{JOURNAL_NAME}"}
        with pytest.raises(OutputExistsError):
            folder.publish()
    assert tree(tmp_path) == before


def test_overwrite_replaces_what_is_ours_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "ours")
    for name in ("empty", "ours"):
        with pytest.raises(OutputExistsError, match=r"exists already; .* give --overwrite"):
            refuse_unsafe_output(tmp_path / name, [], overwrite=False)
        refuse_unsafe_output(tmp_path / name, [], overwrite=True)


def test_a_folder_is_ours_by_its_manifest(tmp_path: Path) -> None:
    write(tmp_path / "ours")
    assert is_our_folder(tmp_path / "ours")
    assert not is_our_folder(tmp_path)
    assert not is_our_folder(tmp_path / "nowhere")
    assert not is_our_folder(tmp_path / "ours" / "text")


# Making one.


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    with OutputFolder(out, JOB) as folder:
        folder.write_file("text", b"new")
        folder.write_file("sub/folder/text", b"deep")
        assert not out.exists()
        folder.publish()
        assert out.exists()
    assert tree(out) == {"text", "sub", "sub/folder", "sub/folder/text"}
    assert tree(out.parent) == {"out"} | {f"out/{name}" for name in tree(out)}


def test_without_publish_nothing_appears(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", JOB) as folder:
        folder.write_file("text", b"new")
    assert tree(tmp_path) == set()


class OopsError(Exception):
    """Such as a bug of diffxfer."""


def fail(
    out: Path,
    error: type[BaseException] = OopsError,
    *,
    overwrite: bool = False,
    also: Path | None = None,
) -> None:
    """Begin a folder, in which somebody else makes a file, and fail."""
    with OutputFolder(out, JOB, overwrite=overwrite) as folder:
        folder.write_file("sub/text", b"new")
        if also is not None:
            also.touch()
        raise error


@pytest.mark.parametrize("error", [OopsError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    before = open_files()
    with pytest.raises(error):
        fail(tmp_path / "a" / "b" / "out", error)
    assert tree(tmp_path) == set()
    assert open_files() == before


def test_parents_that_another_uses_are_kept(tmp_path: Path) -> None:
    with pytest.raises(OopsError):
        fail(tmp_path / "a" / "b" / "out", also=tmp_path / "a" / "theirs")
    assert tree(tmp_path) == {"a", "a/theirs"}


def test_an_old_folder_survives_an_exception(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(OopsError):
        fail(tmp_path / "out", overwrite=True)
    assert text_of(tmp_path / "out") == "old"
    assert len(tree(tmp_path)) == 3


def test_a_file_is_written_once(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", JOB) as folder:
        folder.write_file("text", b"new")
        with pytest.raises(OutputError, match="its text cannot be written"):
            folder.write_file("text", b"again")


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(OutputError, match="cannot be written"), OutputFolder(out, JOB):
            pass
        assert free_bytes(out) > 0
    assert tree(tmp_path) == {"file"}


def test_a_name_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "new" / ("x" * 250)
    with pytest.raises(OutputError, match="name too long"), OutputFolder(out, JOB):
        pass
    assert tree(tmp_path) == set()


def test_a_folder_of_any_name(tmp_path: Path) -> None:
    for name in ("a*[b]?", "größe", " spaced ", "-o"):
        write(tmp_path / name, name)
        write(tmp_path / name, "again", overwrite=True)
        assert text_of(tmp_path / name) == "again"


def test_a_lock_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    before = open_files()
    with pytest.raises(OutputError, match="No locks available"):
        write(tmp_path / "new" / "out")
    assert tree(tmp_path) == set()
    assert open_files() == before


def test_a_disk_that_fails_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OutputFolder(tmp_path / "out", JOB) as folder:
        folder.write_file("text", b"new")
        monkeypatch.setattr(os, "fsync", fail_to_sync)
        with pytest.raises(OutputError, match=r"cannot be written \(Input/output error\)"):
            folder.publish()
    assert tree(tmp_path) == set()


def fail_to_sync(fd: int) -> None:
    raise OSError(5, os.strerror(5))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["new/../out", "new/deep/../../out", "link/../out"])
def test_a_way_there_and_back_makes_no_folder(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/inner")
    home = tmp_path / "real" if name.startswith("link") else tmp_path
    before = tree(tmp_path)
    if overwrite:
        write(home / "out", "old")
        with pytest.raises(OutputExistsError, match="exists already"):
            refuse_unsafe_output(tmp_path / name, [], overwrite=False)
    refuse_unsafe_output(tmp_path / name, [], overwrite=overwrite)
    write(tmp_path / name, overwrite=overwrite)
    assert text_of(home / "out") == "new"
    shutil.rmtree(home / "out")
    assert tree(tmp_path) == before


def test_an_output_that_ends_in_dots_is_the_folder_above(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    for overwrite, words in ((False, "exists already"), (True, "by diffxfer")):
        with pytest.raises(OutputExistsError, match=words):
            refuse_unsafe_output(tmp_path / "new" / "..", [], overwrite=overwrite)


# Replacing one.


def fail_to_sync_the_parent(path: Path) -> None:
    if ".partial-" not in path.name:
        raise OSError(5, os.strerror(5))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fails_after_the_folder_appeared_says_that_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        write(out, "old")
    with monkeypatch.context() as patch:
        whole = pytest.raises(
            OutputError, match=r"out: is complete, but a power failure could still undo"
        )
        with whole, OutputFolder(out, JOB, overwrite=overwrite) as folder:
            patch.setattr(writer, "sync_folder", fail_to_sync_the_parent)
            folder.write_file("text", b"new")
            folder.write_file(MANIFEST_NAME, OURS)
            folder.publish()
    assert text_of(out) == "new"
    left = [path for path in tmp_path.iterdir() if path != out]
    assert [text_of(path) for path in left] == (["old"] if overwrite else [])
    write(out, "newer", overwrite=True)
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_has_the_name_of_an_old_folder_and_is_not_ours_is_kept(
    tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    make(kind, tmp_path / ".out.diffxfer-replaced")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=r"\.out\.diffxfer-replaced: "):
        write(out, overwrite=True)
    assert tree(tmp_path) == before
    assert text_of(out) == "old"


def cannot_exchange(one: Path, other: Path) -> bool:
    return False


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(writer, "exchange", cannot_exchange)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_an_old_folder_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / "stale").touch()
    write(out, "new", overwrite=True)
    assert text_of(out) == "new"
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


@pytest.mark.usefixtures("way")
def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> Path:
    """Replace a folder on a system without exchange, killed after so many renames.

    The first puts the journal aside, the second what is there, the third is the result's.
    """
    out = tmp_path / "out"
    write(out, "old")
    code = f"""
import os, pathlib, signal
from diffxfer.checkpoints import writer
writer.exchange = lambda one, other: False
rename, done = pathlib.Path.rename, []
def counted(self, target):
    if len(done) == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(target)
    return rename(self, target)
pathlib.Path.rename = counted
writer.discard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with writer.OutputFolder(pathlib.Path({str(out)!r}), {OTHER_JOB!r}, overwrite=True) as folder:
    folder.write_file("text", b"interrupted")
    folder.write_file({MANIFEST_NAME!r}, {OURS!r})
    folder.publish()
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr(writer, "exchange", cannot_exchange)
    return out


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_replacement_that_was_cut_off_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    out = cut_off(tmp_path, monkeypatch, renames)
    assert out.exists() == (renames != 2)
    write(out, "new", overwrite=True)
    assert text_of(out) == "new"
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


def test_a_run_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cut_off(tmp_path, monkeypatch, 2)
    with pytest.raises(OopsError), OutputFolder(out, JOB, overwrite=True):
        raise OopsError
    assert text_of(out) == "old"
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


def test_without_overwrite_the_old_folder_is_put_back_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cut_off(tmp_path, monkeypatch, 2)
    refuse_unsafe_output(out, [], overwrite=False)
    with pytest.raises(OutputExistsError, match="has been restored"), OutputFolder(out, JOB):
        pytest.fail("the work must not begin")
    assert text_of(out) == "old"


def test_what_cannot_be_removed_does_not_undo_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, "old")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", unlink)
        write(out, "new", overwrite=True)
    assert text_of(out) == "new"
    write(out, "newer", overwrite=True)
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


# Other runs, dead and alive.

KILLED = """
import os, pathlib, signal
from diffxfer.checkpoints.writer import OutputFolder
with OutputFolder(pathlib.Path({out!r}), {job!r}) as folder:
    folder.write_file("sub/text", b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("job", [JOB, OTHER_JOB])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, job: str) -> None:
    out = tmp_path / "out"
    code = KILLED.format(out=str(out), job=job)
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    write(out)
    assert tree(tmp_path) == {"out", "out/text", f"out/{MANIFEST_NAME}"}


@pytest.mark.parametrize("job", [JOB, OTHER_JOB])
def test_a_run_that_is_alive_is_left_alone(tmp_path: Path, job: str) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, JOB) as folder:
        folder.write_file("text", b"first")
        with pytest.raises(OutputError, match="is being written by another run"):
            write(out, "second", job=job)
        folder.publish()
    assert text_of(out) == "first"
    assert tree(tmp_path) == {"out", "out/text"}


def finds_nothing(folder: Path, pattern: str) -> Iterator[Path]:
    yield from ()


def test_two_runs_that_begin_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, JOB) as folder:
        monkeypatch.setattr(type(tmp_path), "glob", finds_nothing)
        with pytest.raises(OutputError, match="is being written by another run"):
            write(out)
        folder.write_file("text", b"first")
        folder.publish()
    assert text_of(out) == "first"


def test_only_partials_of_this_output_are_removed(tmp_path: Path) -> None:
    theirs = [".out.partial-download", ".out.partial-", ".out2.partial-0123456789ab"]
    theirs += ["out.partial-0123456789ab", ".out.partial-0123456789abc", ".out.replaced"]
    for name in theirs:
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert all((tmp_path / name).is_dir() for name in theirs)


def test_names_are_no_patterns(tmp_path: Path) -> None:
    for name in ("a[b]", "ab", "*", "?"):
        (tmp_path / f".{name}.partial-{JOB[:12]}").mkdir()
    write(tmp_path / "a[b]")
    write(tmp_path / "*")
    assert {path.name[1:3] for path in tmp_path.glob(".*")} == {"ab", "?."}


# Shards.


def shard(folder: OutputFolder, size: int, pending: int = 1) -> ShardWriter:
    layout = layout_shard([("w", "U8", (size,))])
    return ShardWriter(folder, "model.safetensors", layout, pending)


def test_a_shard_is_filled_in_any_order(tmp_path: Path) -> None:
    before = open_files()
    with OutputFolder(tmp_path / "out", JOB) as folder:
        made = shard(folder, 9, 3)
        made.create()
        for at in (6, 0, 3):
            made.write(memoryview(b"abcdefghi"[at : at + 3]), made.layout.starts["w"] + at)
        assert open_files() == before + 2  # the folder's lock and the journal
        folder.publish()
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert content == made.layout.header + b"abcdefghi"


def test_a_shard_of_empty_tensors_is_complete_at_once(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", JOB) as folder:
        made = shard(folder, 0, 0)
        made.create()
        folder.publish()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == made.layout.header


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with OutputFolder(tmp_path / "out", JOB) as folder:
            shard(folder, 0, 0).create()
            folder.write_file("text", b"")
            folder.publish()
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_shard_whose_file_vanished_is_an_error(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", JOB) as folder:
        made = shard(folder, 3)
        made.create()
        (folder.partial / "model.safetensors").unlink()
        with pytest.raises(OutputError, match=r"its model\.safetensors cannot be written"):
            made.write(memoryview(b"abc"), 0)


def test_a_shard_that_cannot_be_made_durable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    with OutputFolder(tmp_path / "out", JOB) as folder:
        made = shard(folder, 3)
        made.create()
        monkeypatch.setattr(os, "fsync", fail_to_sync)
        with pytest.raises(OutputError, match="Input/output error"):
            made.write(memoryview(b"abc"), 0)
        made.close()
    assert open_files() == before


def test_a_sync_in_the_middle_of_a_write_does_not_stand_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, fsync = os.pwrite, os.fsync
    order: list[str] = []

    def write_late(fd: int, data: bytes, offset: int) -> int:
        order.append("begun")
        made.sync()
        count = pwrite(fd, data, offset)
        order.append("written")
        return count

    def tell(fd: int) -> None:
        order.append("synced")
        fsync(fd)

    with OutputFolder(tmp_path / "out", JOB) as folder:
        made = shard(folder, 6, 2)
        made.create()
        start = made.layout.starts["w"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", tell)
            made.write(memoryview(b"abc"), start)
            patch.setattr(os, "pwrite", write_late)
            made.write(memoryview(b"def"), start + 3)
    assert order == ["begun", "synced", "written", "synced"]


def test_a_limit_on_the_size_of_files_is_an_error(tmp_path: Path) -> None:
    code = f"""
import pathlib, resource
from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.checkpoints.writer import OutputFolder
from diffxfer.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with OutputFolder(pathlib.Path({str(tmp_path / "new" / "out")!r}), {JOB!r}) as folder:
        layout = layout_shard([("w", "U8", (2 << 20,))])
        ShardWriter(folder, "model.safetensors", layout, 1).create()
except OutputError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "its model.safetensors cannot be written (File too large)" in done.stdout
    assert tree(tmp_path) == set()


# Disks that are too small.


def test_too_little_disk_is_told_before_the_work(tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet" / "there"
    refuse_small_disk(out, 1)
    with pytest.raises(DiskSpaceError, match=r"needs 1125\.90 TB, but only [0-9.]+ [GT]B are free"):
        refuse_small_disk(out, 1 << 50)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk, on Linux")
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not possible here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "3m") as disk:
        yield disk


def test_a_small_disk_is_told_before_the_work(small_disk: Path) -> None:
    refuse_small_disk(small_disk / "out", 1 << 20)
    with pytest.raises(DiskSpaceError, match=r"needs 3\.00 MB, but only 3\.15 MB are free"):
        refuse_small_disk(small_disk / "out", 3_000_000)


def test_a_full_disk_is_met_when_a_shard_is_allocated(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_in_memory", lambda _: False)  # as on a real disk
    full = pytest.raises(DiskSpaceError, match="the disk is full")
    with OutputFolder(small_disk / "out", JOB) as folder, full:
        shard(folder, 4 << 20).create()
    assert tree(small_disk) == set()


def test_a_full_disk_is_met_by_a_write_where_nothing_is_reserved(small_disk: Path) -> None:
    with OutputFolder(small_disk / "out", JOB) as folder:
        made = shard(folder, 4 << 20)
        made.create()
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            made.write(memoryview(bytes(4 << 20)), made.layout.starts["w"])
    made.close()
    assert tree(small_disk) == set()
    assert free_bytes(small_disk / "out") == 3 << 20


def test_a_full_disk_is_met_by_a_small_file(small_disk: Path) -> None:
    full = pytest.raises(DiskSpaceError, match="the disk is full")
    with OutputFolder(small_disk / "out", JOB) as folder, full:
        folder.write_file("tokenizer.json", bytes(4 << 20))
    assert tree(small_disk) == set()


# The index.


def test_the_index_is_as_transformers_writes_it() -> None:
    made = index_json({"model-2": ["layers.10", "a"], "model-1": ["layers.2"]}, 12, 24)
    expected = {
        "metadata": {"total_parameters": 12, "total_size": 24},
        "weight_map": {"a": "model-2", "layers.10": "model-2", "layers.2": "model-1"},
    }
    assert made.decode() == json.dumps(expected, indent=2, sort_keys=True) + "\n"


def test_overwrite_spares_what_somebody_put_into_our_folder(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "diffxfer.json").write_bytes(OURS)
    (out / "text").write_text("ours")
    theirs = out / "checkpoint-500" / "weights"
    theirs.write_text("theirs")
    with pytest.raises(OutputExistsError, match="checkpoint-500/weights: was not written by"):
        refuse_unsafe_output(out, [], overwrite=True)
    assert theirs.read_text() == "theirs"
