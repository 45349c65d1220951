"""Where a checkpoint comes from: a folder on this machine, or the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.hub.names import HubId, read_hub_id
from diffxfer.checkpoints.shard_index import INDEX_NAME, SINGLE_SHARD
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.hub.names import HubFile

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint is.

    Attributes:
        folder: its folder; of a model on the Hub, the one of its commit in the Hub's cache, which
            has everything but the weights.
        files: what the Hub has of it by name; None where the folder is all there is.
    """

    folder: Path
    files: Mapping[str, HubFile] | None = None

    @property
    def label(self) -> str:
        """What it is called in a message."""
        file = next(iter(self.files.values()), None) if self.files is not None else None
        return str(self.folder) if file is None else f"{file.repo}@{file.commit[:8]}"

    def has(self, name: str) -> bool:
        """Whether it has a file of that name, here or there."""
        if self.files is not None:
            return name in self.files
        return os.path.lexists(self.folder / name)

    def matching(self, pattern: str) -> list[str]:
        """The names, sorted, of its files that match a pattern such as ``*.bin``."""
        if self.files is not None:
            return sorted(name for name in self.files if fnmatchcase(name, pattern))
        return sorted(path.name for path in self.folder.glob(pattern))


def find(named: Path | str, what: str) -> Place:
    """Find what was named: a folder if there is one of that name, else a model on the Hub.

    Of a model on the Hub, everything but the weights is brought into the Hub's cache.

    Args:
        named: a folder, or ``org/name`` or ``org/name@revision``.
        what: what is due there, such as ``"the base checkpoint"``.

    Raises:
        CheckpointError: if it is neither.
        HubError: if it reads as a model on the Hub, and cannot be had.
    """
    model = find_id(named, what)
    if model is None:
        require_folder(Path(named), what, or_id=True)
        return Place(Path(named))
    from diffxfer.checkpoints.hub.snapshot import open_snapshot

    return Place(*open_snapshot(model))


def find_id(named: Path | str, what: str) -> HubId | None:
    """The model on the Hub that was named; None where a folder was, with a slip perhaps.

    Args:
        named: as for `find`.
        what: as for `find`.

    Raises:
        CheckpointError: if it cannot be told whether there is such a folder.
    """
    folder, model = Path(named), read_hub_id(named)
    if model is None or _exists(folder, what):
        return None
    slip = model.revision is None and _near_name(folder) is not None
    return None if slip else model


def _exists(folder: Path, what: str) -> bool:
    try:
        return folder.exists()
    except OSError as exc:
        problem = f"cannot be opened ({exc.strerror}), where {what} is due"
        raise CheckpointError(folder, problem, "check the path") from exc


def require_folder(folder: Path, what: str, *, or_id: bool = False) -> None:
    """Make sure that what was named is a folder.

    Args:
        folder: what the user named.
        what: what is due there, such as ``"the base checkpoint"``.
        or_id: whether a model on the Hub would have done too.

    Raises:
        CheckpointError: if it is none.
    """
    if _exists(folder, what):
        if folder.is_dir():
            return
        problem = f"is a file, where {what} is due"
        raise CheckpointError(folder, problem, "give the folder that holds it")
    problem = f"no such folder, where {what} is due"
    near = _near_name(folder)
    remedy = "check the path" if near is None else f"did you mean {near}?"
    if or_id and near is None:
        remedy += "; a model on the Hub is named org/name, or org/name@revision"
    elif or_id and read_hub_id(folder) is not None:
        remedy += f" The one on the Hub is {folder}@main"
    raise CheckpointError(folder, problem, remedy)


def _near_name(folder: Path) -> Path | None:
    """A folder beside it whose name is nearly the same."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    near = get_close_matches(folder.name, beside, n=1, cutoff=0.8)
    return folder.parent / near[0] if near else None


def no_weights(place: Place) -> CheckpointError:
    """What to raise where there is neither a single shard nor an index.

    Args:
        place: the checkpoint.
    """
    pickles = sorted(name for pattern in _PICKLES for name in place.matching(pattern))
    if pickles:
        return CheckpointError(
            place.label,
            f"has pickled weights only ({pickles[0]}), which are never loaded: a pickle runs code",
            "save it as safetensors where you trust it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    others = place.matching("*.safetensors")
    found = f"only {', '.join(others[:3])}" if others else "none"
    return CheckpointError(
        place.label,
        f"expected {SINGLE_SHARD} or {INDEX_NAME}, found {found}",
        "save the model with save_pretrained, or download the whole folder",
    )
