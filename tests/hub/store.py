"""The repositories of the Hub that the tests talk to: folders, one for each commit."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGE = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".model", ".npz")
"""Files that the Hub keeps outside git, and sends through a CDN."""


@dataclass
class Repo:
    """One repository of models.

    Attributes:
        id: ``org/name``.
        folder: where its commits lie.
        private: whether it is visible only to users who may read it.
        gated: whether its files are only for users who accepted its licence.
        refs: the commit of every branch and tag.
    """

    id: str
    folder: Path
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's own id names, None if there is none."""
        found = self.refs.get(revision, revision)
        return found if "/" not in found and (self.folder / found).is_dir() else None

    def at(self, revision: str = "main") -> Path:
        """The folder of a commit."""
        commit = self.commit_of(revision)
        assert commit is not None, f"{self.id} has no {revision}"
        return self.folder / commit

    def commit(
        self,
        changes: Mapping[str, bytes | Path | None],
        *,
        branch: str = "main",
        message: str = "",
    ) -> str:
        """Make a commit on a branch.

        Args:
            changes: new contents by path, None for a file to delete.
            branch: the branch, made if it is new.
            message: what it says.

        Returns:
            Its id.
        """
        before = self.refs.get(branch)
        made = self.folder / "new"
        if before is None:
            made.mkdir(parents=True)
        else:
            shutil.copytree(self.folder / before, made)
        for name, content in changes.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            elif content is not None:
                path.write_bytes(content)
        digest = hashlib.sha1(f"{before}\0{message}\0".encode())
        for name, file in files_in(made).items():
            digest.update(f"{name}\0{etag_of(file)}\0".encode())
        commit = digest.hexdigest()
        if (self.folder / commit).exists():
            shutil.rmtree(made)
        else:
            made.rename(self.folder / commit)
        self.refs[branch] = commit
        return commit

    def commit_folder(self, folder: Path, *, branch: str = "main") -> str:
        """Make a commit of all the files in a folder."""
        return self.commit(dict(files_in(folder)), branch=branch)


def files_in(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative name, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def is_large(name: str) -> bool:
    """Whether the Hub keeps a file of that name outside of git."""
    return name.endswith(LARGE)


def sha256_of(data: bytes | Path) -> str:
    """The hash by which large files are known."""
    return hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data).hexdigest()


def etag_of(file: Path) -> str:
    """A file's ETag: SHA-256 if it is large, else git's own id of it."""
    if is_large(file.name):
        return sha256_of(file)
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
