"""The folder `.OUT.tuning` beside the output: what a run that was cut off continues from.

It holds `run.json`, what the run is made from, and the Trainer's checkpoints. A checkpoint counts
once it has `complete.json`, which is written last, after all its files are on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.companions import list_companions, read_bytes, read_object
from diffxfer.checkpoints.filesystem import lock_folder, sync_folder, sync_tree
from diffxfer.checkpoints.place import place_of
from diffxfer.errors import CompanionError, OutputError, TrainingError, UnfinishedError
from diffxfer.recycling.atomic_write import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint

_RUN = "run.json"
_COMPLETE = "complete.json"
# The second name is that of versions before 0.2.
_TEMPORARY = ("run.partial", "run.json.partial", "names")
_HASHED = ("model", "teacher", "data")
_NAME = re.compile(r"checkpoint-(\d+)")


def quick_fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one state of a model's folder from another, by its shards' headers and times.

    Args:
        checkpoint: the model.
    """
    digest = xxhash.xxh3_128()
    for shard in checkpoint.weights.shards:
        known = (shard.path.name, shard.size, shard.header_hash, shard.identity[-1])
        digest.update(repr(known).encode())
    for name in list_companions(checkpoint.folder).names:
        digest.update(name.encode() + read_bytes(checkpoint.folder / name))
    return digest.hexdigest()


class TrainingWorkspace:
    """Where a run keeps what it can be continued from.

    Args:
        out: the output, beside which it is.
    """

    def __init__(self, out: Path) -> None:
        place = place_of(out)
        self.path = place.parent / f".{place.name}.tuning"
        self._lock_fd = -1
        self._created_parents: list[Path] = []
        self._created = False

    def open(self, run: dict[str, Any], *, restart: bool) -> None:
        """Make the folder, or make sure that it is this run's; one process does this.

        Args:
            run: what the run is made from, as values that JSON has.
            restart: begin anew, whatever is there.

        Raises:
            TrainingError: if the folder is not ours.
            UnfinishedError: if another run's state is there.
            OutputError: if it cannot be written, or a run is going on in it.
        """
        try:
            parents = self.path.parents
            self._created_parents = [path for path in parents if not os.path.lexists(path)]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = lock_folder(self.path)
        except BlockingIOError as exc:
            remedy = "wait for that one, or choose another -o"
            raise OutputError(self.path, "is in use by another run", remedy) from exc
        except OSError as exc:
            problem = f"cannot be written ({exc.strerror or exc})"
            raise OutputError(self.path, problem, "choose another -o") from exc
        known = self._read_run()
        # Where no state was complete there is nothing to lose.
        if known is not None and not restart and self.latest_state() is not None:
            self._refuse_other_run(known, run)
        else:
            self._created = True
            self._clear()
            write_atomically(self.path / _RUN, json.dumps(run, indent=1).encode())
        for folder in self._states():
            if not _is_complete(folder):
                shutil.rmtree(folder)

    def _read_run(self) -> dict[str, Any] | None:
        """What the run in the folder is made from; None if there is none."""
        path = self.path / _RUN
        names = [inner.name for inner in self.path.iterdir()]
        if not path.exists() and all(map(_is_leftover, names)):
            return None  # cut off while it was made, emptied or removed
        try:
            return read_object(path)
        except CompanionError as exc:
            problem = "is not what a run of diffxfer tune left"
            raise TrainingError(self.path, problem, "move it elsewhere") from exc

    def _refuse_other_run(self, known: dict[str, Any], run: dict[str, Any]) -> None:
        for key in run:
            if known.get(key) != run[key]:
                was = "" if key in _HASHED else f": {known.get(key)} there, {run[key]} here"
                raise UnfinishedError(
                    self.path,
                    f"holds a run that was cut off, and whose {key} is another{was}",
                    "repeat that run's command to continue it, or give --restart to drop it",
                )

    def _clear(self) -> None:
        # What tells that the folder is ours goes last.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == _RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def latest_state(self) -> tuple[int, Path] | None:
        """The last step of which there is a complete state, and where that is."""
        return max(
            ((_step(folder), folder) for folder in self._states() if _is_complete(folder)),
            default=None,
        )

    def mark_complete(self, folder: Path) -> None:
        """Declare a checkpoint complete, and remove those before it; one process does this.

        Args:
            folder: the checkpoint, all of whose files are written.
        """
        sync_tree(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        write_atomically(folder / _COMPLETE, json.dumps({"sizes": sizes}).encode())
        sync_folder(self.path)
        for other in self._states():
            if _step(other) < _step(folder):
                shutil.rmtree(other)

    def remove(self) -> None:
        """Remove the folder, once the output is there."""
        with suppress(OSError):
            self._clear()
            self.path.rmdir()

    def close(self) -> None:
        """Let go of it: it stays only if there is something in it to continue from."""
        if self._lock_fd < 0:  # another process has it, or another run
            return
        if self._created and self.path.is_dir() and self.latest_state() is None:
            self.remove()
        os.close(self._lock_fd)
        self._lock_fd = -1
        for folder in self._created_parents:
            with suppress(OSError):  # above all where there is something in it by now
                folder.rmdir()

    def _states(self) -> list[Path]:
        return [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]


def _is_leftover(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) or name in _TEMPORARY


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _is_complete(folder: Path) -> bool:
    """Whether all files are there that were there when it was declared so."""
    marker = folder / _COMPLETE
    if not marker.is_file():
        return False
    sizes = read_object(marker)["sizes"]
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )
