"""The companions of one model: those in a folder, or those of a planned output."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import (
    TEMPLATE_FOLDER,
    companion_path,
    more_templates,
    read_bytes,
)
from diffxfer.checkpoints.json_read import parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Beside:
    """The companions of a model.

    Attributes:
        folder: the folder of the files; for a planned output, the folder to create.
        planned: the planned companions by name, each as bytes or as a file to copy; None to read
            the folder.
    """

    folder: Path
    planned: Mapping[str, bytes | Path] | None = None

    def where(self, name: str) -> Path:
        """A file's path for messages."""
        return self.folder / name

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None if there is no such file.

        Raises:
            CompanionError: it cannot be read, or must not be followed.
        """
        if self.planned is None:
            path = companion_path(self.folder, name)
            return None if path is None else read_bytes(path)
        content = self.planned.get(name)
        return content if content is None or isinstance(content, bytes) else read_bytes(content)

    def document(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, empty if there is no such file.

        Raises:
            CompanionError: it cannot be read, or holds no object.
        """
        raw = self.read(name)
        return {} if raw is None else parse_object(raw, self.where(name))

    def matching(self, pattern: str) -> list[str]:
        """The sorted names of top-level files that match a pattern."""
        if self.planned is None:
            return sorted(path.name for path in self.folder.glob(pattern))
        return sorted(name for name in self.planned if fnmatchcase(name, pattern))

    def more_templates(self) -> list[str]:
        """The sorted names of files in the folder of additional chat templates.

        Raises:
            CompanionError: it cannot be listed, or leads out of the folder.
        """
        if self.planned is None:
            return more_templates(self.folder)
        return sorted(name for name in self.planned if name.startswith(f"{TEMPLATE_FOLDER}/"))
