"""Files that are complete on disk, or absent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diffxfer.checkpoints.filesystem import sync_folder

if TYPE_CHECKING:
    from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file durably: after a crash, it has either its old or its new content.

    Args:
        path: the file; the content is first written to the same name with the suffix ``.partial``.
        content: its bytes.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
