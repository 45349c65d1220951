"""Temporary folders that are removed even after a kill: by the next run."""

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
    """Create a temporary folder, and remove it when the block ends.

    A killed run leaves its folder behind. The folder of a live run is locked, so that the next run
    can remove the others.

    Args:
        home: the parent folder; None for the system's temporary folder, see `TMPDIR`.

    Yields:
        The empty folder.

    Raises:
        OutputError: if the folder cannot be created.
    """
    home = home or Path(gettempdir())
    try:
        _remove_stale(home)
        folder, lock = _make(home)
    except OSError as exc:
        raise write_error(home, "temporary folder", exc) from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(home: Path) -> tuple[Path, int]:
    """Create and lock a folder; retry if another run removes it before it is locked."""
    while True:
        folder = Path(mkdtemp(prefix=_PREFIX, dir=home))
        with suppress(BlockingIOError, FileNotFoundError):
            return folder, lock_folder(folder)


def _remove_stale(home: Path) -> None:
    """Remove the folders of killed runs of this user; ignore those that cannot be removed."""
    for folder in home.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = lock_folder(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
