"""The result of `push`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of a push.

    Attributes:
        name: relative to the repository.
        bytes: its size, 0 for a removed file.
        fate: ``"new"``, ``"changed"``, ``"unchanged"`` or ``"removed"``.
    """

    name: str
    bytes: int
    fate: str


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was published, or would be published without `dry_run`.

    Attributes:
        repo: ``org/name``.
        url: the address of the repository.
        kind: ``"diff"``, ``"graft"`` or ``"tuned"``.
        dry_run: whether nothing was written.
        pushed: whether a commit was made.
        created: whether the repository was created, or would be.
        private: whether the repository is private, or would be.
        commit: the latest commit; None if there is none.
        files: every file and its fate.
        card: the published README.
        use: how to use the repository, one line.
        elapsed_s: the duration of the call in seconds.
        warnings: one line each.
    """

    repo: str
    url: str
    kind: str
    dry_run: bool
    pushed: bool
    created: bool
    private: bool
    commit: str | None
    files: tuple[PushedFile, ...]
    card: str
    use: str
    elapsed_s: float
    warnings: tuple[str, ...]

    @property
    def bytes_in_all(self) -> int:
        """The bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def bytes_to_upload(self) -> int:
        """The bytes of the new and changed files."""
        return sum(file.bytes for file in self.files if file.fate in ("new", "changed"))

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        sums = {"bytes_in_all": self.bytes_in_all, "bytes_to_upload": self.bytes_to_upload}
        return {**asdict(self), **sums}
