"""Partial folders: what a run that is not finished has beside OUT, and whether it is ours.

A partial folder is ours by the journal in it. For the moment in which it becomes OUT, its journal
stands beside it, so that OUT never has one; a run that is killed then leaves both.
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
    from collections.abc import Iterator
    from pathlib import Path

_HEX_12 = "[0-9a-f]" * 12
_BESIDE = ".journal"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a run that was cut off left.

    Attributes:
        folder: where.
        percent: how much is done, rounded down.
    """

    folder: Path
    percent: int

    def __str__(self) -> str:
        return f"{self.percent} % is kept at {self.folder}"


def partial_of(out: Path, fingerprint: str) -> Path:
    """The partial folder of a job.

    Args:
        out: where its folder is to appear.
        fingerprint: of the job, in hexadecimal.
    """
    return out.parent / f".{out.name}.partial-{fingerprint[:12]}"


def partials_of(out: Path) -> Iterator[Path]:
    """Everything beside a folder that has the name of a partial one of it."""
    yield from sorted(out.parent.glob(f".{glob.escape(out.name)}.partial-{_HEX_12}"))


def find_unfinished(out: Path) -> Unfinished | None:
    """What a run to a folder left when it was cut off, if it is worth to be continued.

    Args:
        out: the folder that was to be made.
    """
    found = (unfinished(partial) for partial in partials_of(place_of(out)))
    return next((kept for kept in found if kept), None)


def unfinished(partial: Path) -> Unfinished | None:
    """What there is to be continued in a partial folder; less than a hundredth is nothing.

    Args:
        partial: the folder.
    """
    known = summarize(partial / JOURNAL_NAME)
    return Unfinished(partial, known.percent) if known and known.percent else None


def is_our_partial(partial: Path) -> bool:
    """Whether a folder with the name of a partial one is one.

    It has our journal; or it is empty, as its run was cut off before it had one; or it is what
    OUT was before the result took its place.
    """
    journal = partial / JOURNAL_NAME
    if is_journal(journal) or is_our_folder(partial):
        return True
    names = os.listdir(partial)  # noqa: PTH208 names alone
    return not names or (names == [JOURNAL_NAME] and is_stillborn(journal))


def claim(partial: Path) -> tuple[int, bool]:
    """Make a partial folder, or take over the one that is there.

    Returns:
        A descriptor that locks it, and whether it is new.

    Raises:
        BlockingIOError: if another run has it.
        OutputError: if something else has its name.
        OSError: if it cannot be made.
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
        raise BlockingIOError from exc  # a run that began at the same moment has or had it
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
    problem = "is in the way, and has no journal of ours"
    return OutputError(partial, problem, "move it elsewhere, or choose another -o")


def open_journal(partial: Path, fingerprint: str, *, restart: bool) -> tuple[Journal, bool]:
    """The journal of a partial folder that is claimed; a folder without progress is emptied.

    Args:
        partial: the folder.
        fingerprint: of the job, in hexadecimal.
        restart: empty it in any case.

    Returns:
        The journal, and whether there is something to be continued.
    """
    path, known_as = partial / JOURNAL_NAME, bytes.fromhex(fingerprint)
    known = None if restart else summarize(path)
    if known and known.done_bytes and known.fingerprint == known_as:
        return Journal(path, known_as, known.inode, known), True
    empty(partial)
    return Journal(path, known_as, partial.stat().st_ino), False


def empty(partial: Path, keep: frozenset[str] = frozenset()) -> None:
    """Remove what is in a partial folder.

    What tells that it is ours goes last: a run may be killed in the middle of this.

    Args:
        partial: the folder.
        keep: names that stay.
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
    """Remove a partial folder as far as that is possible; what stays is for the next run.

    Args:
        partial: the folder.
    """
    with suppress(OSError):
        empty(partial)
        partial.rmdir()


def clear_others(out: Path, ours: Path, *, restart: bool) -> None:
    """See to the partial folders that other runs to the same place left.

    Args:
        out: that place.
        ours: the one that is claimed.
        restart: discard them whatever they hold.

    Raises:
        BlockingIOError: if a run has one.
        OutputError: if one holds progress, which may be hours of somebody's.
    """
    for beside in out.parent.glob(f".{glob.escape(out.name)}.partial-{_HEX_12}{_BESIDE}"):
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
                problem = f"an unfinished run of other inputs or options is there: {kept}"
                remedy = "give that run's command to continue it, or --restart to discard it"
                raise UnfinishedError(out, problem, remedy)
            empty(partial)
            partial.rmdir()
        finally:
            os.close(fd)


def put_journal_aside(partial: Path) -> None:
    """Take the journal out of a folder that is complete, to stand beside it.

    Args:
        partial: the folder.
    """
    (partial / JOURNAL_NAME).rename(_beside(partial))


def take_back_journal(partial: Path) -> None:
    """Put a journal back that stands beside its folder, or remove it if that one is gone.

    Args:
        partial: the folder.
    """
    beside = _beside(partial)
    known = summarize(beside)
    if known is None:
        return
    # The exchange of two folders may have put OUT's former content here.
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
    """Remove the journal of a folder that has become OUT; what cannot be is no failure.

    Args:
        partial: where the folder was.
    """
    with suppress(OSError):
        _beside(partial).unlink()


def _beside(partial: Path) -> Path:
    return partial.with_name(partial.name + _BESIDE)
