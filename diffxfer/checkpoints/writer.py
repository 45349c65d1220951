"""Writing a folder that appears whole or not at all.

All files are written to a sibling folder `.OUT.partial-…`, which is renamed to OUT once everything
is durable. A run that ends earlier leaves nothing at OUT. It keeps the partial folder if there is
progress in it, and the next run of the same job resumes from it.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffxfer.checkpoints.filesystem import exchange, sync_folder
from diffxfer.checkpoints.journal import JOURNAL_NAME
from diffxfer.checkpoints.output_place import place_of, refuse_foreign
from diffxfer.checkpoints.partial import (
    claim,
    clear_others,
    discard,
    empty,
    open_journal,
    partial_of,
    put_journal_aside,
    remove_journal_beside,
    take_back_journal,
    unfinished,
)
from diffxfer.errors import (
    DiffxferError,
    DiskSpaceError,
    InputChangedError,
    MatchError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from diffxfer.checkpoints.journal import Journal


class PartialFolder(Protocol):
    """A partial folder as those see it who write into it.

    Attributes:
        out: the output folder, for messages.
        partial: the folder.
        journal: records what is done.
    """

    @property
    def out(self) -> Path:
        """The output folder."""

    @property
    def partial(self) -> Path:
        """The folder."""

    @property
    def journal(self) -> Journal:
        """The journal."""


class OutputFolder:
    """An output folder being written; use it as a context manager.

    Only `publish` publishes the folder; call it inside the block. If the block ends without it, the
    partial folder is kept if its journal has progress to resume, and removed otherwise.

    Args:
        out: the output folder.
        fingerprint: identifies the job: 32 hexadecimal digits.
        overwrite: whether a folder at `out` is replaced.
        restart: whether unfinished runs are discarded.
        scratch: the name of a file that is needed until the folder is complete.

    Attributes:
        journal: the journal of completed work, inside the block.
        scratch: the name of the scratch file, empty if there is none.
        resumed: whether there is an earlier run's progress to resume.
    """

    journal: Journal

    def __init__(
        self,
        out: Path,
        fingerprint: str,
        *,
        overwrite: bool = False,
        restart: bool = False,
        scratch: str = "",
    ) -> None:
        self.out = place_of(out)
        self.scratch = scratch
        self.partial = partial_of(self.out, fingerprint)
        self.resumed = False
        self._fingerprint = fingerprint
        self._overwrite = overwrite
        self._restart = restart
        self._lock_fd = -1
        self._made_parents: list[Path] = []
        self._published = False

    def __enter__(self) -> OutputFolder:
        try:
            self._make_parents()
            self._lock_fd, new = claim(self.partial)
            clear_others(self.out, self.partial, restart=self._restart)
            self._recover()
            self._open_journal(new=new)
        except OSError as exc:
            self._abandon()
            if isinstance(exc, BlockingIOError):
                remedy = "wait for that run, or choose another -o"
                problem = "is being written by another run"
                raise OutputError(self.out, problem, remedy) from exc
            problem = f"cannot be written ({exc.strerror or exc})"
            raise OutputError(self.out, problem, "choose another -o") from exc
        except BaseException:
            self._abandon()
            raise
        return self

    def _open_journal(self, *, new: bool) -> None:
        self.journal, self.resumed = open_journal(
            self.partial, self._fingerprint, restart=self._restart
        )
        if new:  # after a power cut, the journal must identify the folder as ours
            for folder in (self.partial, *(made.parent for made in self._made_parents)):
                sync_folder(folder)
            sync_folder(self.partial.parent)

    def _abandon(self) -> None:
        """Undo the changes of a run that could not begin; keep what earlier runs left."""
        if self._lock_fd >= 0:
            if unfinished(self.partial) is None:
                discard(self.partial)
            os.close(self._lock_fd)
            self._lock_fd = -1
        self._remove_parents()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.journal.close()
        if not self._published:
            kept = None if _is_useless_after(exc) else unfinished(self.partial)
            if kept is None:
                discard(self.partial)
                self._remove_parents()
            elif isinstance(exc, DiffxferError):
                exc.remedy += f"; {kept}, and the same command continues from there"
        os.close(self._lock_fd)

    def held_bytes(self) -> int:
        """How many bytes of the disk the partial folder occupies, without the scratch file."""
        files = (path for path in self.partial.rglob("*") if path.is_file())
        return sum(path.stat().st_blocks * 512 for path in files if path.name != self.scratch)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove an earlier run's files, except the journal, the scratch file and the named ones.

        Args:
            names: the files to keep.

        Raises:
            OutputError: if something cannot be removed.
        """
        try:
            empty(self.partial, frozenset((JOURNAL_NAME, self.scratch, *names)))
        except OSError as exc:
            raise write_error(self.out, "", exc) from exc

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
        """Make everything durable and rename the folder to `out`.

        Raises:
            OutputError: if that fails; nothing appears at `out` then, unless the message says so.
        """
        old = None
        try:
            if self.scratch:
                (self.partial / self.scratch).unlink(missing_ok=True)
            # The journal must not be in OUT, but must exist until OUT does: the next run needs it.
            put_journal_aside(self.partial)
            for path, _, _ in os.walk(self.partial):
                sync_folder(Path(path))
            if os.path.lexists(self.out):
                old = self._replace()
            else:
                self.partial.rename(self.out)
            self._published = True
        except OSError as exc:
            raise write_error(self.out, "", exc) from exc
        finally:
            if not self._published:
                with suppress(OSError):
                    take_back_journal(self.partial)
        remove_journal_beside(self.partial)
        try:
            for folder in (self.out, *self._made_parents):
                sync_folder(folder.parent)
        except OSError as exc:
            problem = f"is complete, but a power failure could still undo it ({exc.strerror})"
            raise OutputError(self.out, problem, "check the disk") from exc
        if old is not None:
            # Remove it only now, because a power cut could have restored it under its old name. If
            # this fails, the result is still valid, and the next run removes the rest.
            discard(old)

    def _replace(self) -> Path:
        """Replace the existing folder; returns the new path of the old one."""
        if not self._overwrite:
            raise OutputExistsError(self.out, "appeared during the run", "choose another -o")
        refuse_foreign(self.out)  # the folder may have been replaced meanwhile
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
        """Undo a replacement that was interrupted between its two renames."""
        if not os.path.lexists(self._aside):
            return
        refuse_foreign(self._aside)  # its name alone does not make it ours
        if os.path.lexists(self.out):
            empty(self._aside)
            self._aside.rmdir()
            return
        self._aside.rename(self.out)
        if not self._overwrite:
            problem = "was being replaced when a run was interrupted, and has been restored"
            raise OutputExistsError(self.out, problem, "choose another -o, or give --overwrite")

    def _make_parents(self) -> None:
        missing = self.out.parent
        while not missing.exists():
            self._made_parents.append(missing)
            missing = missing.parent
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def _remove_parents(self) -> None:
        for folder in self._made_parents:
            with suppress(OSError):  # mostly because somebody has put files into it
                folder.rmdir()


def _is_useless_after(exc: BaseException | None) -> bool:
    """Whether the partial folder is useless after a failure, since resuming would fail again."""
    if isinstance(exc, InputChangedError):
        # A changed input makes a different job, but a missing one may come back.
        return os.path.lexists(exc.where)
    return isinstance(exc, (NonFiniteError, MatchError))


def write_error(out: Path, name: str, exc: OSError) -> OutputError:
    """The error for a failure to write the file `name`, or the folder itself if `name` is empty."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(out, "the disk is full", "free disk space, and run it again")
    what = f"its {name} " if name else ""
    return OutputError(out, f"{what}cannot be written ({exc.strerror})", "check the disk")


def index_json(
    shards: Mapping[str, Sequence[str]], total_parameters: int, total_size: int
) -> bytes:
    """The index of a sharded checkpoint, as transformers writes it.

    Args:
        shards: the names of the tensors in each shard.
        total_parameters: the number of elements.
        total_size: their size in bytes.
    """
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
