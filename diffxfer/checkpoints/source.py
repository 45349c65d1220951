"""Where a checkpoint comes from: a folder on this machine."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"(?P<id>{_WORD}/(?P<name>{_WORD}))(@(?P<revision>\S+))?")
_DOWNLOAD = "hf download {id} --exclude 'original/*' --local-dir {folder}"


def require_folder(folder: Path, what: str) -> None:
    """Make sure that what was named is a folder.

    Args:
        folder: what the user named.
        what: what is due there, such as ``"the base checkpoint"``.

    Raises:
        CheckpointError: if it is none; for what reads as a Hub id, it says how to download it.
    """
    try:
        if folder.is_dir():
            return
        exists = folder.exists()
    except OSError as exc:
        problem = f"cannot be opened ({exc.strerror}), where {what} is due"
        raise CheckpointError(folder, problem, "check the path") from exc
    if exists:
        problem = f"is a file, where the folder of {what} is due"
        raise CheckpointError(folder, problem, "give the folder that holds it")
    problem = f"no such folder, where {what} is due"
    near = _near_name(folder)
    if near is not None:
        raise CheckpointError(folder, problem, f"did you mean {near}?")
    found = _HUB_ID.fullmatch(str(folder))
    if found is None:
        command = _DOWNLOAD.format(id="org/name", folder="FOLDER")
        remedy = f"check the path; a model on the Hub must be downloaded first: {command}"
    else:
        revision = f" --revision {found['revision']}" if found["revision"] else ""
        command = _DOWNLOAD.format(id=found["id"] + revision, folder=found["name"])
        remedy = f"taken for a Hub id, it must be downloaded first: {command}"
    raise CheckpointError(folder, problem, remedy)


def _near_name(folder: Path) -> Path | None:
    """A folder beside it whose name is nearly the same."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    near = get_close_matches(folder.name, beside, n=1, cutoff=0.8)
    return folder.parent / near[0] if near else None
