"""Finding a checkpoint: a local folder, or a model on the Hub."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from diffxfer.checkpoints.foreign import refuse_foreign_file
from diffxfer.checkpoints.hub.repo_ids import HubId, read_hub_id
from diffxfer.checkpoints.location import Place as Place  # for all who import it from here
from diffxfer.errors import CheckpointError


def find(named: Path | str, what: str) -> Place:
    """Find a folder, or if there is none of that name, a model on the Hub.

    For a model on the Hub, all files but the weights are downloaded into the Hub's cache.

    Args:
        named: a folder, or ``org/name`` or ``org/name@revision``.
        what: what is expected there, such as ``"the base checkpoint"``.

    Raises:
        CheckpointError: if it is neither.
        HubError: if it has the form of a Hub id, but cannot be fetched.
    """
    model = find_id(named, what)
    if model is None:
        require_folder(Path(named), what, or_id=True)
        return Place(Path(named))
    from diffxfer.checkpoints.hub.snapshot import open_snapshot

    return Place(*open_snapshot(model))


def find_id(named: Path | str, what: str) -> HubId | None:
    """The id of a model on the Hub; None if a folder was meant, even one that does not exist.

    Args:
        named: as for `find`.
        what: as for `find`.

    Raises:
        CheckpointError: if the existence of such a folder cannot be checked.
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
        problem = f"cannot be opened ({exc.strerror}), expected {what}"
        raise CheckpointError(folder, problem, "check the path") from exc


def require_folder(folder: Path, what: str, *, or_id: bool = False) -> None:
    """Check that a path is a folder.

    Args:
        folder: the path that the user gave.
        what: what is expected there, such as ``"the base checkpoint"``.
        or_id: whether a model on the Hub is accepted too, for the message.

    Raises:
        CheckpointError: if it is not a folder.
    """
    if _exists(folder, what):
        if folder.is_dir():
            return
        refuse_foreign_file(folder)
        problem = f"is a file, expected {what}"
        raise CheckpointError(folder, problem, "give the folder that contains it")
    problem = f"no such folder, expected {what}"
    near = _near_name(folder)
    remedy = "check the path" if near is None else f"did you mean {near}?"
    if or_id and near is None:
        remedy += "; a model on the Hub is named org/name, or org/name@revision"
    elif or_id and read_hub_id(folder) is not None:
        remedy += f" For the model on the Hub, give {folder}@main"
    raise CheckpointError(folder, problem, remedy)


def _near_name(folder: Path) -> Path | None:
    """A folder beside it with a similar name."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    near = get_close_matches(folder.name, beside, n=1, cutoff=0.8)
    return folder.parent / near[0] if near else None
