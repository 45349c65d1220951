"""What a push tells its caller."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of a push.

    Attributes:
        name: relative to the repository.
        bytes: its size, 0 for one that goes.
        fate: ``"new"``, ``"changed"``, ``"unchanged"`` or ``"removed"``.
    """

    name: str
    bytes: int
    fate: str


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was published, or with `dry_run` what would be.

    Attributes:
        repo: ``org/name``.
        url: its address.
        kind: ``"diff"``, ``"graft"`` or ``"tuned"``.
        dry_run: whether it was only to be seen.
        pushed: whether there is a new commit.
        created: whether the repository was made, or would be.
        private: whether it is private; for one that is yet to be made, whether it was asked for.
        commit: the latest commit; None before there is one.
        files: what became of every file.
        card: the README that is published.
        use: how to use it, one line.
        elapsed_s: seconds from the call to the result.
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
        """The bytes of those that the repository did not have as they are."""
        return sum(file.bytes for file in self.files if file.fate in ("new", "changed"))

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        sums = {"bytes_in_all": self.bytes_in_all, "bytes_to_upload": self.bytes_to_upload}
        return {**asdict(self), **sums}
