"""Folders for grafts that nobody keeps: removed in any case, if need be by the next run."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TYPE_CHECKING

from diffxfer.checkpoints.filesystem import lock_folder
from diffxfer.checkpoints.writer import write_error

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX = ".diffxfer-scratch-"


@contextmanager
def scratch_folder(home: Path | None) -> Iterator[Path]:
    """A folder that is gone when the block ends, however it ends.

    A run that is killed cannot remove its own; a lock tells those that nobody uses any more.

    Args:
        home: where it is made; None for the folder of temporary files, which `TMPDIR` names.

    Yields:
        The folder, empty.

    Raises:
        OutputError: if it cannot be made.
    """
    home = home or Path(gettempdir())
    try:
        _remove_stale(home)
        folder, lock = _make(home)
    except OSError as exc:
        raise write_error(home, "folder for what is not kept", exc) from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(home: Path) -> tuple[Path, int]:
    """A new folder and its lock; another run may take it for stale before it is locked."""
    while True:
        folder = Path(mkdtemp(prefix=_PREFIX, dir=home))
        with suppress(BlockingIOError, FileNotFoundError):
            return folder, lock_folder(folder)


def _remove_stale(home: Path) -> None:
    """Remove what killed runs of this user left; what cannot be removed is in nobody's way."""
    for folder in home.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = lock_folder(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
