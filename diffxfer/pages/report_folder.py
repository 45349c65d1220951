"""A folder with a page, `report.html`, and its data, `report.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.atomic_write import write_atomically
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diffxfer.pages.page import Page

PAGE, DATA = "report.html", "report.json"


def report_folder(folder: Path | str, inputs: Iterable[Path]) -> Path:
    """Check that a folder can take a report: it is new, empty, or has an earlier report only.

    Args:
        folder: the folder.
        inputs: the folders that are read, which must not contain it.

    Returns:
        The folder.

    Raises:
        OutputExistsError: if it is or is inside an input, is a file, or has other files.
    """
    folder = Path(folder)
    real = Path(os.path.realpath(folder))
    for source in (Path(os.path.realpath(path)) for path in inputs):
        if source == real or source in real.parents:
            where = "is" if source == real else "is inside"
            raise OutputExistsError(folder, f"{where} the input {source}", "choose another -o")
    nearest = next(path for path in (real, *real.parents) if path.exists())
    if not nearest.is_dir():
        raise OutputExistsError(nearest, "is not a folder", "choose another -o")
    others = sorted(path.name for path in real.iterdir()) if nearest == real else []
    others = [name for name in others if name not in (PAGE, DATA)]
    if others:
        problem = f"has other files, such as {others[0]}"
        raise OutputExistsError(folder, problem, "choose a new folder as -o")
    return folder


def write_report(folder: Path, page: Page, data: Mapping[str, Any]) -> None:
    """Write the page and its data.

    Args:
        folder: the result of `report_folder`; it is created if necessary.
        page: the page.
        data: the data as JSON values.

    Raises:
        OutputError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(folder / DATA, text.encode())
    except OSError as exc:
        raise write_error(folder, DATA, exc) from exc
    page.write(folder / PAGE)
