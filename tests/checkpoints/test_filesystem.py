"""The calls of the operating system that Python does not offer, on real files."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from diffxfer.checkpoints import filesystem
from diffxfer.checkpoints.filesystem import allocate, exchange, sync_folder
from tests.helpers import open_files


class WithoutCalls:
    """A C library that lacks them, as macOS's does."""


@pytest.mark.parametrize("size", [0, 1, 4096, 5_000_001])
def test_allocates_files_of_any_size(tmp_path: Path, size: int) -> None:
    with (tmp_path / "file").open("wb") as file:
        allocate(file.fileno(), size)
    assert (tmp_path / "file").stat().st_size == size


def test_allocation_reserves_the_disk(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        allocate(file.fileno(), 1 << 20)
        if os.fstat(file.fileno()).st_blocks == 0:
            pytest.skip("this file system cannot allocate")
        assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 20


def test_nothing_is_reserved_in_memory() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("there is no tmpfs here")
    with tempfile.TemporaryFile(dir=folder) as file:
        allocate(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_size == 1 << 20
        assert os.fstat(file.fileno()).st_blocks == 0


def test_allocation_has_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_libc", WithoutCalls())
    with (tmp_path / "file").open("wb") as file:
        allocate(file.fileno(), 1 << 20)
    assert (tmp_path / "file").stat().st_size == 1 << 20


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Invalid argument"):
        allocate(file.fileno(), 10)


def test_exchanges_two_folders(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system cannot exchange")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()


def test_an_exchange_with_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with suppress(FileNotFoundError):
        assert not exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one").exists()


def test_a_system_without_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_libc", WithoutCalls())
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "file").touch()
    assert not exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "file").exists()


def test_folders_are_made_durable(tmp_path: Path) -> None:
    before = open_files()
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")
    assert open_files() == before


@pytest.mark.parametrize(("code", "matters"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, matters: bool
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if matters:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
