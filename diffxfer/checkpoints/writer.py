"""Writing a folder that appears whole or not at all.

Everything goes to a sibling folder `.OUT.partial-…`; only when all of it is durable is that
folder renamed. A run that fails removes it; one that is killed leaves it for the next run to
remove, and leaves nothing at OUT.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import read_object
from diffxfer.checkpoints.filesystem import exchange, lock_folder, sync_folder
from diffxfer.errors import DiskSpaceError, OutputError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

MANIFEST_NAME = "diffxfer.json"
_MARGIN_BYTES = 1 << 20
_HEX_12 = "[0-9a-f]" * 12


def refuse_unsafe_output(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, lies inside one or holds one.

    Args:
        out: the folder to be made.
        inputs: every folder and file that is read.
        overwrite: whether a folder of ours at `out` may be replaced.

    Raises:
        OutputExistsError: if it must not be written.
    """
    # `Path.resolve` raises at a loop of links before Python 3.13.
    real = Path(os.path.realpath(out))
    for source in dict.fromkeys(Path(os.path.realpath(path)) for path in inputs):
        if real == source or source in real.parents:
            where = "is" if real == source else "lies inside"
            raise OutputExistsError(out, f"{where} the input {source}", "choose another -o")
        if real in source.parents:
            raise OutputExistsError(out, f"holds the input {source}", "choose another -o")
    place = place_of(out)
    if not os.path.lexists(place):
        _refuse_file_above(place)
        return
    if not overwrite:
        raise OutputExistsError(out, "exists already", "choose another -o, or give --overwrite")
    _refuse_foreign(place)


def place_of(out: Path) -> Path:
    """The absolute path of an output.

    `..` is taken out of it, links followed: `new/../out` would make `new` only to leave it empty.

    Args:
        out: as the user named it.
    """
    out = out.absolute()
    if ".." not in out.parts:
        return out
    if out.name == "..":
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(out.parent)) / out.name  # what is a link itself stays one


def _refuse_file_above(out: Path) -> None:
    nearest = next(parent for parent in out.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise OutputError(out, f"cannot be made: {nearest} is not a folder", "choose another -o")


def _refuse_foreign(out: Path) -> None:
    """Refuse to replace what is neither a folder of ours nor an empty one."""
    if out.is_symlink() or not out.is_dir():
        raise OutputExistsError(out, "is not a folder", "remove it, or choose another -o")
    if not any(out.iterdir()):
        return
    if not is_our_folder(out):
        raise OutputExistsError(
            out,
            f"has no {MANIFEST_NAME} of ours, so --overwrite does not replace it",
            "remove it yourself, or choose another -o",
        )
    foreign = _foreign_file(out)
    if foreign is not None:
        raise OutputExistsError(
            foreign,
            f"was put there by somebody else, so --overwrite does not replace {out.name}",
            "move it elsewhere, or choose another -o",
        )


def _foreign_file(out: Path) -> Path | None:
    """A file in a folder of ours that its manifest does not name."""
    manifest = read_object(out / MANIFEST_NAME)
    named = {MANIFEST_NAME}
    for key in ("shards", "files"):
        found = manifest.get(key)
        named |= found.keys() if isinstance(found, dict) else set()
    for folder, _, names in os.walk(out):
        for name in sorted(names):
            path = Path(folder, name)
            if path.relative_to(out).as_posix() not in named:
                return path
    return None


def is_our_folder(folder: Path) -> bool:
    """Whether a folder was written by diffxfer, by its manifest."""
    path = folder / MANIFEST_NAME
    try:
        if not path.is_file():  # opening a FIFO would wait for ever
            return False
        with path.open("rb") as file:
            # Enough to see what it is; a manifest of a large model is megabytes long.
            return b'"diffxfer_format"' in file.read(256)
    except OSError:
        return False


def free_bytes(out: Path) -> int:
    """How many bytes can be written where `out` is to be."""
    parent = place_of(out).parent
    while not parent.exists():
        parent = parent.parent
    status = os.statvfs(parent)
    return status.f_bavail * status.f_frsize


def refuse_small_disk(out: Path, needed: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        DiskSpaceError: if fewer than `needed` bytes are free.
    """
    free = free_bytes(out)
    if needed + _MARGIN_BYTES > free:
        problem = f"needs {_gigabytes(needed)}, and {_gigabytes(free)} are free there"
        raise DiskSpaceError(out, problem, "free some disk, or choose another -o")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


class OutputFolder:
    """A folder in the making; use it as a context manager.

    Leaving the block without an exception publishes nothing by itself: `publish` does, and it must
    be called inside the block. Leaving it otherwise removes every trace.

    Args:
        out: where the folder is to appear.
        fingerprint: tells one job from another, in hexadecimal.
        overwrite: whether a folder at `out` is replaced.
    """

    def __init__(self, out: Path, fingerprint: str, *, overwrite: bool = False) -> None:
        self.out = place_of(out)
        self.partial = self.out.parent / f".{self.out.name}.partial-{fingerprint[:12]}"
        self._overwrite = overwrite
        self._lock_fd = -1
        self._made_parents: list[Path] = []
        self._published = False

    def __enter__(self) -> OutputFolder:
        try:
            self._make_parents()
            for stale in self.out.parent.glob(f".{glob.escape(self.out.name)}.partial-{_HEX_12}"):
                self._remove_stale(stale)
            self._recover()
            self._claim()
        except OSError as exc:
            with suppress(OSError):
                self.partial.rmdir()
            self._remove_parents()
            problem = f"cannot be written ({exc.strerror or exc})"
            raise OutputError(self.out, problem, "choose another -o") from exc
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._remove_parents()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, durably.

        Args:
            name: relative to the folder.
            content: its bytes.

        Raises:
            OutputError: if it cannot be written.
        """
        path = self.partial / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise write_error(self.out, name, exc) from exc

    def publish(self) -> None:
        """Make everything durable and let the folder appear.

        Raises:
            OutputError: if that fails; nothing appears then, unless the message says so.
        """
        old = None
        try:
            for path, _, _ in os.walk(self.partial):
                sync_folder(Path(path))
            if os.path.lexists(self.out):
                old = self._replace()
            else:
                self.partial.rename(self.out)
            self._published = True
        except OSError as exc:
            raise write_error(self.out, "", exc) from exc
        try:
            for folder in (self.out, *self._made_parents):
                sync_folder(folder.parent)
        except OSError as exc:
            problem = f"is whole, but a power cut could still undo it ({exc.strerror})"
            raise OutputError(self.out, problem, "check the disk") from exc
        if old is not None:
            # Only now, as a power cut could have brought it back under its name. What cannot be
            # removed does not undo the result; the next run removes it.
            shutil.rmtree(old, ignore_errors=True)

    def _replace(self) -> Path:
        """Take the place of the folder that is there; returns where that one is now."""
        if not self._overwrite:
            raise OutputExistsError(self.out, "appeared while it was made", "choose another -o")
        _refuse_foreign(self.out)  # it may be another one by now
        old = self.partial
        if not exchange(self.partial, self.out):
            old = self._aside
            self.out.rename(old)
            self.partial.rename(self.out)
        return old

    @property
    def _aside(self) -> Path:
        return self.out.parent / f".{self.out.name}.diffxfer-replaced"

    def _recover(self) -> None:
        """Undo a replacement that was cut off between its two renames."""
        if not os.path.lexists(self._aside):
            return
        _refuse_foreign(self._aside)  # its name alone does not make it ours
        if os.path.lexists(self.out):
            shutil.rmtree(self._aside)
            return
        self._aside.rename(self.out)
        if not self._overwrite:
            problem = "was being replaced when a run was cut off, and has been put back"
            raise OutputExistsError(self.out, problem, "choose another -o, or give --overwrite")

    def _claim(self) -> None:
        try:
            self.partial.mkdir()
            self._lock_fd = lock_folder(self.partial)
        except (FileExistsError, BlockingIOError) as exc:  # both runs began at the same moment
            raise self._busy() from exc

    def _remove_stale(self, stale: Path) -> None:
        """Remove what a killed run left, unless it is alive after all."""
        try:
            fd = lock_folder(stale)
        except BlockingIOError as exc:
            raise self._busy() from exc
        try:
            shutil.rmtree(stale)
        finally:
            os.close(fd)

    def _busy(self) -> OutputError:
        remedy = "wait for that one, or choose another -o"
        return OutputError(self.out, "is being written by another run", remedy)

    def _make_parents(self) -> None:
        missing = self.out.parent
        while not missing.exists():
            self._made_parents.append(missing)
            missing = missing.parent
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def _remove_parents(self) -> None:
        for folder in self._made_parents:
            with suppress(OSError):  # above all where another has put something into it
                folder.rmdir()


def write_error(out: Path, name: str, exc: OSError) -> OutputError:
    """What the failure to write the file `name` of a folder means; no name is the folder itself."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(out, "the disk became full", "free some disk and run it again")
    what = f"its {name} " if name else ""
    return OutputError(out, f"{what}cannot be written ({exc.strerror})", "check the disk")


def index_json(
    shards: Mapping[str, Sequence[str]], total_parameters: int, total_size: int
) -> bytes:
    """The index of a sharded checkpoint, as transformers writes it.

    Args:
        shards: the names of the tensors in each shard.
        total_parameters: how many elements there are.
        total_size: in how many bytes.
    """
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
