"""Whether the base of an adapter is the model that the adapter names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.hub.repo_ids import cached_id
from diffxfer.errors import printable

if TYPE_CHECKING:
    from diffxfer.checkpoints.location import Place


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
