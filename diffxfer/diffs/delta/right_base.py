"""The base that an adapter names: whether another is that model, and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.hub.repo_ids import cached_id, read_hub_id
from diffxfer.checkpoints.reader import Checkpoint, open_checkpoint
from diffxfer.diffs.matching.names import pair_names
from diffxfer.errors import DiffxferError, printable

if TYPE_CHECKING:
    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.location import Place


def stated_base(stated: str) -> Checkpoint | None:
    """The base that an adapter names, if it is on this machine: a folder, or in the Hub's cache.

    Args:
        stated: the adapter's ``base_model_name_or_path``; empty if it states none.

    Returns:
        The model; None if it is not here, or is no whole checkpoint. Nothing is downloaded.
    """
    folder = _stated_folder(stated)
    if folder is None:
        return None
    try:
        return open_checkpoint(folder, "base")
    except DiffxferError:  # a name proves little: what is there may be anything
        return None


def is_resized(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether an embedding that an adapter stores beside its factors has other rows than base's.

    Args:
        adapter: the adapter.
        base: its base.
    """
    pairs = pair_names(adapter.copies, base.tensors, ("the adapter", "base"))
    return any(
        adapter.copies[name].shape != base.tensors[known].shape for name, known in pairs.items()
    )


def _stated_folder(stated: str) -> Path | None:
    if not stated or "\0" in stated:
        return None
    if Path(stated).is_dir():
        return Path(stated)
    if read_hub_id(stated) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(stated, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def note_of_base(stated: str, base: Place) -> str | None:
    """Say whether an adapter's base has the name that its config states.

    Names prove little: the same model has several, and a folder has any. So this is no error.

    Args:
        stated: the adapter's ``base_model_name_or_path``; empty if it states none.
        base: the base that the user gave.

    Returns:
        A line; None if the adapter states none.
    """
    if not stated:
        return None
    hub = cached_id(base.folder)
    given = str(base.folder) if hub is None else hub.repo
    if _same(stated, given):
        return f"base has the name that the adapter states: {printable(stated)}"
    return (
        f"the adapter was made for {printable(stated)}, and base is {printable(given)}:"
        " check that this is the same model"
    )


def _same(stated: str, given: str) -> bool:
    """Whether two names may be of one model: equal, or with equal last parts."""
    ours, theirs = Path(stated), Path(given)
    return ours == theirs or ours.name.casefold() == theirs.name.casefold()
