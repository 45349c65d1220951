"""Partial folders: the unfinished output of a run, beside OUT.

The journal in a partial folder identifies it as ours. While the folder is renamed to OUT, its
journal is moved beside it, so that OUT never has one; a run killed at that moment leaves both.
"""

from __future__ import annotations

import glob
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.filesystem import lock_folder
from diffxfer.checkpoints.journal import (
    JOURNAL_NAME,
    Journal,
    Summary,
    is_journal,
    is_stillborn,
    summarize,
)
from diffxfer.checkpoints.output_place import MANIFEST_NAME, is_our_folder, place_of
from diffxfer.errors import OutputError, UnfinishedError

if TYPE_CHECKING:
    from pathlib import Path

_HEX_12 = "[0-9a-f]" * 12
_BESIDE = ".journal"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An unfinished run.

    Attributes:
        folder: its partial folder.
        percent: how much is done, rounded down.
    """

    folder: Path
    percent: int

    def __str__(self) -> str:
        return f"{self.percent} % is kept at {self.folder}"


def partial_of(out: Path, fingerprint: str) -> Path:
    """The partial folder of a job.

    Args:
        out: the output folder.
        fingerprint: the job's fingerprint, in hexadecimal.
    """
    return out.parent / f".{out.name}.partial-{fingerprint[:12]}"


def partials_of(out: Path, suffix: str = "") -> list[Path]:
    """Everything beside an output folder that has the name of its partial folders, or a suffix."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.partial-{_HEX_12}{suffix}"))


def find_unfinished(out: Path) -> Unfinished | None:
    """The unfinished run to an output folder, if it is worth resuming.

    Args:
        out: the output folder.
    """
    found = (unfinished(partial) for partial in partials_of(place_of(out)))
    return next((kept for kept in found if kept), None)


def unfinished(partial: Path) -> Unfinished | None:
    """The unfinished run in a partial folder; None if less than 1 % is done.

    Args:
        partial: the folder.
    """
    known = summarize(partial / JOURNAL_NAME)
    return Unfinished(partial, known.percent) if known and known.percent else None


def is_our_partial(partial: Path) -> bool:
    """Whether a folder with the name of a partial folder is one.

    It is one if it has our journal; if it is empty, because its run ended before it had one; or if
    it is the former OUT, which the result replaced.
    """
    journal = partial / JOURNAL_NAME
    if is_journal(journal) or is_our_folder(partial):
        return True
    names = os.listdir(partial)  # noqa: PTH208 names alone
    return not names or (names == [JOURNAL_NAME] and is_stillborn(journal))


def claim(partial: Path) -> tuple[int, bool]:
    """Create a partial folder, or take over an existing one.

    Returns:
        A descriptor that locks it, and whether it is new.

    Raises:
        BlockingIOError: if another run has locked it.
        OutputError: if something else has its name.
        OSError: if it cannot be created.
    """
    new = True
    try:
        partial.mkdir()
    except FileExistsError:
        new = False
        if partial.is_symlink() or not partial.is_dir():
            raise _in_the_way(partial) from None
    try:
        fd = lock_folder(partial)
    except (BlockingIOError, FileNotFoundError) as exc:
        raise BlockingIOError from exc  # another run, begun at the same moment, has or had it
    except OSError:
        if new:
            partial.rmdir()
        raise
    try:
        if not new:
            take_back_journal(partial)
            if not is_our_partial(partial):
                raise _in_the_way(partial)
    except BaseException:
        os.close(fd)
        raise
    return fd, new


def _in_the_way(partial: Path) -> OutputError:
    problem = "was not written by diffxfer, but has the name that it needs"
    return OutputError(partial, problem, "move it elsewhere, or choose another -o")


def open_journal(partial: Path, fingerprint: str, *, restart: bool) -> tuple[Journal, bool]:
    """Open the journal of a claimed partial folder; empties a folder without progress.

    Args:
        partial: the folder.
        fingerprint: the job's fingerprint, in hexadecimal.
        restart: empty the folder in any case.

    Returns:
        The journal, and whether there is progress to resume.
    """
    path, known_as = partial / JOURNAL_NAME, bytes.fromhex(fingerprint)
    known = None if restart else summarize(path)
    if known and known.done_bytes and known.fingerprint == known_as:
        return Journal(path, known_as, known.inode, known), True
    empty(partial)
    return Journal(path, known_as, partial.stat().st_ino), False


def empty(partial: Path, keep: frozenset[str] = frozenset()) -> None:
    """Remove the contents of a partial folder.

    The journal goes last, so that the folder is still ours if the run is killed meanwhile.

    Args:
        partial: the folder.
        keep: names to keep.
    """
    marks = (JOURNAL_NAME, MANIFEST_NAME)
    for path in sorted(partial.iterdir(), key=lambda path: path.name in marks):
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def discard(partial: Path) -> None:
    """Remove a partial folder as far as possible; the next run removes the rest.

    Args:
        partial: the folder.
    """
    with suppress(OSError):
        empty(partial)
        partial.rmdir()


def clear_others(out: Path, ours: Path, *, restart: bool) -> None:
    """Remove the partial folders of other runs to the same output, or refuse to.

    Args:
        out: the output folder.
        ours: the partial folder that this run has claimed.
        restart: discard them even if they hold progress.

    Raises:
        BlockingIOError: if another run has locked one.
        OutputError: if one holds progress, which may be hours of work.
    """
    for beside in partials_of(out, _BESIDE):
        partial = beside.with_name(beside.name.removesuffix(_BESIDE))
        if not os.path.lexists(partial):
            take_back_journal(partial)
    for partial in partials_of(out):
        if partial == ours or partial.is_symlink() or not partial.is_dir():
            continue
        fd = lock_folder(partial)
        try:
            take_back_journal(partial)
            if not is_our_partial(partial):
                continue
            kept = unfinished(partial)
            if kept and not restart:
                problem = f"has an unfinished run with other inputs or options: {kept}"
                remedy = "repeat that run's command to continue it, or give --restart to discard it"
                raise UnfinishedError(out, problem, remedy)
            empty(partial)
            partial.rmdir()
        finally:
            os.close(fd)


def put_journal_aside(partial: Path) -> None:
    """Move the journal of a complete folder beside it.

    Args:
        partial: the folder.
    """
    (partial / JOURNAL_NAME).rename(_beside(partial))


def take_back_journal(partial: Path) -> None:
    """Move a journal beside its folder back into it, or remove it if the folder is gone.

    Args:
        partial: the folder.
    """
    beside = _beside(partial)
    known = summarize(beside)
    if known is None:
        return
    # Swapping the folders may have put OUT's former content here.
    if _speaks_of(known, partial) and not os.path.lexists(partial / JOURNAL_NAME):
        beside.rename(partial / JOURNAL_NAME)
    else:
        beside.unlink()


def _speaks_of(known: Summary, partial: Path) -> bool:
    try:
        return partial.stat().st_ino == known.inode
    except OSError:
        return False


def remove_journal_beside(partial: Path) -> None:
    """Remove the journal of a folder that has become OUT; a failure is ignored.

    Args:
        partial: the folder's former path.
    """
    with suppress(OSError):
        _beside(partial).unlink()


def _beside(partial: Path) -> Path:
    return partial.with_name(partial.name + _BESIDE)
