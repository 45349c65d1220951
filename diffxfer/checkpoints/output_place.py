"""Checking the path of an output and its disk space."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import read_object
from diffxfer.errors import DiskSpaceError, OutputError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MANIFEST_NAME = "diffxfer.json"
_MARGIN_BYTES = 1 << 20


def refuse_unsafe_output(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, lies inside one or contains one.

    Args:
        out: the folder to create.
        inputs: every folder and file that is read.
        overwrite: whether a folder that diffxfer wrote at `out` may be replaced.

    Raises:
        OutputExistsError: if `out` must not be written.
    """
    # Before Python 3.13 `Path.resolve` raises at a loop of links.
    real = Path(os.path.realpath(out))
    for source in dict.fromkeys(Path(os.path.realpath(path)) for path in inputs):
        if real == source or source in real.parents:
            where = "is" if real == source else "is inside"
            raise OutputExistsError(out, f"{where} the input {source}", "choose another -o")
        if real in source.parents:
            raise OutputExistsError(out, f"contains the input {source}", "choose another -o")
    place = place_of(out)
    if not os.path.lexists(place):
        _refuse_file_above(place)
        return
    if not overwrite:
        raise OutputExistsError(out, "exists already", "choose another -o, or give --overwrite")
    refuse_foreign(place)


def place_of(out: Path) -> Path:
    """The absolute path of an output.

    `..` is resolved, following links: otherwise `new/../out` would create an empty `new`.

    Args:
        out: the path as given.
    """
    out = out.absolute()
    if ".." not in out.parts:
        return out
    if out.name == "..":
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(out.parent)) / out.name  # a link at `out` itself is not followed


def _refuse_file_above(out: Path) -> None:
    nearest = next(parent for parent in out.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise OutputError(out, f"cannot be created: {nearest} is not a folder", "choose another -o")


def refuse_foreign(out: Path) -> None:
    """Refuse to replace anything but an empty folder or one that diffxfer wrote.

    Args:
        out: the path to be replaced.

    Raises:
        OutputExistsError: if it must not be replaced.
    """
    if out.is_symlink() or not out.is_dir():
        raise OutputExistsError(out, "is not a folder", "remove it, or choose another -o")
    if not any(out.iterdir()):
        return
    if not is_our_folder(out):
        raise OutputExistsError(
            out,
            f"has no {MANIFEST_NAME} by diffxfer, so --overwrite does not replace it",
            "remove it yourself, or choose another -o",
        )
    foreign = _foreign_file(out)
    if foreign is not None:
        raise OutputExistsError(
            foreign,
            f"was not written by diffxfer, so --overwrite does not replace {out.name}",
            "move it elsewhere, or choose another -o",
        )


def _foreign_file(out: Path) -> Path | None:
    """A file in a folder of ours that the manifest does not name."""
    named = {MANIFEST_NAME, *named_files(read_object(out / MANIFEST_NAME))}
    for folder, _, names in os.walk(out):
        for name in sorted(names):
            path = Path(folder, name)
            if path.relative_to(out).as_posix() not in named:
                return path
    return None


def named_files(manifest: Mapping[str, Any]) -> set[str]:
    """The files that a manifest of any version names, except itself.

    Args:
        manifest: its object; it is not trusted.
    """
    parts = (manifest.get(key) for key in ("shards", "files"))
    return {name for part in parts if isinstance(part, dict) for name in part}


def is_our_folder(folder: Path) -> bool:
    """Whether a folder was written by diffxfer, by its manifest."""
    path = folder / MANIFEST_NAME
    try:
        # diffxfer writes no links, and opening a FIFO would block forever.
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            # The beginning is enough; the manifest of a large model is megabytes long.
            return b'"diffxfer_format"' in file.read(256)
    except OSError:
        return False


def free_bytes(out: Path) -> int:
    """Free bytes on the disk of `out`, which may not exist yet."""
    status = os.statvfs(_nearest(out))
    return status.f_bavail * status.f_frsize


def _nearest(out: Path) -> Path:
    """The nearest existing parent folder of `out`."""
    parent = place_of(out).parent
    while not parent.exists():
        parent = parent.parent
    return parent


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders, existing or not, are on the same disk."""
    return _nearest(one / "in").stat().st_dev == _nearest(other / "in").stat().st_dev


def refuse_small_disk(out: Path, needed: int, held: int = 0) -> None:
    """Refuse an output that does not fit on its disk.

    Args:
        out: the folder to create.
        needed: how many bytes it takes.
        held: how many of them an unfinished run already occupies.

    Raises:
        DiskSpaceError: if too few bytes are free.
    """
    free = free_bytes(out)
    if needed + _MARGIN_BYTES > free + held:
        problem = f"needs {gigabytes(needed - held)}, but only {gigabytes(free)} are free"
        raise DiskSpaceError(out, problem, "free disk space, or choose another -o")


def gigabytes(count: int) -> str:
    """Format a number of bytes; a GB is 10⁹ bytes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if round(count / size, 2) >= 1:
            return f"{count / size:.2f} {unit}"
    return "1 byte" if count == 1 else f"{count} bytes"
