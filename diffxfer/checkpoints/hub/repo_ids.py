"""Names of models on the Hub, checked before anything is fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(@(?P<revision>.+))?")
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|/\.|\.(lock)?$|/$|^[-/.]")
"""Patterns that git forbids in names of branches and tags."""
_CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the Hub.

    Attributes:
        repo: ``org/name``.
        revision: a branch, a tag or a commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def read_hub_id(named: Path | str) -> HubId | None:
    """Parse ``org/name`` or ``org/name@revision``; None if it has another form.

    Args:
        named: the text or path that the user gave.
    """
    found = _HUB_ID.fullmatch(str(named))
    if found is None or _NO_REVISION.search(found["revision"] or "main"):
        return None
    return HubId(found["repo"], found["revision"])


def cached_id(folder: Path) -> HubId | None:
    """The model and commit of a snapshot folder in the Hub's cache, None for any other folder.

    Args:
        folder: any folder.
    """
    folder = folder.resolve()
    found = _CACHED.fullmatch(folder.parent.parent.name)
    if found is None or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
        return None
    return HubId(f"{found['org']}/{found['name']}", folder.name)


def shown_name(folder: Path) -> str:
    """A model's name for people: its id for a snapshot in the Hub's cache, else its folder.

    Args:
        folder: any folder.
    """
    model = cached_id(folder)
    return folder.name if model is None else model.repo


def place_name(folder: Path) -> Path | str:
    """A model's name for messages: id and commit for a snapshot in the cache, else its folder.

    Args:
        folder: any folder.
    """
    model = cached_id(folder)
    return folder if model is None else f"{model.repo}@{(model.revision or '')[:8]}"


def is_inside(name: str) -> bool:
    """Whether a name in a list of files stays inside the repository's folder.

    Args:
        name: relative to the repository, with ``/``.
    """
    parts = name.split("/")
    return "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(parts)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model on the Hub at one commit; its content never changes.

    Attributes:
        repo: ``org/name``.
        commit: the commit.
        name: relative to the repository.
        size: in bytes.
        etag: its hash on the Hub.
        path: its path in the Hub's cache once it is downloaded.
    """

    repo: str
    commit: str
    name: str
    size: int
    etag: str
    path: Path

    @property
    def here(self) -> bool:
        """Whether it is downloaded."""
        return self.path.is_file()

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """The identity of its content, in the form of `stat_identity`."""
        return 0, int(self.etag[:15], 16), self.size, 0
