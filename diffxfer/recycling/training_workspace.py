"""The folder `.OUT.tuning` beside the output, from which an interrupted run is resumed.

It contains `run.json`, the inputs and options of the run, and the states that the Trainer saves as
`checkpoint-STEP`. A state is valid if it has a `complete.json`, which is written last, after all
files of the state are durable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.atomic_write import write_atomically
from diffxfer.checkpoints.companions import list_companions, read_bytes, read_object
from diffxfer.checkpoints.filesystem import lock_folder, sync_folder, sync_tree
from diffxfer.checkpoints.output_place import place_of
from diffxfer.errors import CompanionError, OutputError, TrainingError, UnfinishedError

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
    """A hash of a checkpoint's shard headers, modification times and companions.

    It detects that the checkpoint changed without reading its weights.

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
    """The folder in which a training run saves the states from which it can be resumed.

    Args:
        out: the output folder; the workspace is created beside it.
    """

    def __init__(self, out: Path) -> None:
        place = place_of(out)
        self.path = place.parent / f".{place.name}.tuning"
        self._lock_fd = -1
        self._created_parents: list[Path] = []
        self._created = False

    def open(self, run: dict[str, Any], *, restart: bool) -> None:
        """Create the folder, or check that it belongs to this run; only one process calls this.

        Args:
            run: the inputs and options of the run, as JSON values.
            restart: discard the state of an earlier run.

        Raises:
            TrainingError: if the folder was not created by diffxfer.
            UnfinishedError: if it has the state of a different run.
            OutputError: if it cannot be written, or another run is using it.
        """
        try:
            parents = self.path.parents
            self._created_parents = [path for path in parents if not os.path.lexists(path)]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = lock_folder(self.path)
        except BlockingIOError as exc:
            remedy = "wait for that run, or choose another -o"
            raise OutputError(self.path, "is in use by another run", remedy) from exc
        except OSError as exc:
            problem = f"cannot be written ({exc.strerror or exc})"
            raise OutputError(self.path, problem, "choose another -o") from exc
        known = self._read_run()
        # Without a complete state, nothing is lost by starting over.
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
        """The inputs and options of the run in the folder; None if there is no run."""
        path = self.path / _RUN
        names = [inner.name for inner in self.path.iterdir()]
        if not path.exists() and all(map(_is_leftover, names)):
            return None  # the process was killed while it created or cleared the folder
        try:
            return read_object(path)
        except CompanionError as exc:
            problem = "is not the state of a diffxfer tune run"
            raise TrainingError(self.path, problem, "move it elsewhere") from exc

    def _refuse_other_run(self, known: dict[str, Any], run: dict[str, Any]) -> None:
        for key in run:
            if known.get(key) != run[key]:
                was = "" if key in _HASHED else f": {known.get(key)} there, {run[key]} here"
                raise UnfinishedError(
                    self.path,
                    f"has the state of an interrupted run, in which {key} differs{was}",
                    "repeat that run's command to resume it, or give --restart to discard it",
                )

    def _clear(self) -> None:
        # `run.json` identifies the folder as ours, so it is removed last.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == _RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def latest_state(self) -> tuple[int, Path] | None:
        """The number of the last step with a complete state, and the folder of that state."""
        return max(
            ((_step(folder), folder) for folder in self._states() if _is_complete(folder)),
            default=None,
        )

    def mark_complete(self, folder: Path) -> None:
        """Mark a state complete and remove earlier ones; only one process calls this.

        Args:
            folder: the state, after all of its files were written.
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
        """Remove the folder after the output was published."""
        with suppress(OSError):
            self._clear()
            self.path.rmdir()

    def close(self) -> None:
        """Unlock the folder; remove it if it has no state to resume from."""
        if self._lock_fd < 0:  # another process or run has opened it
            return
        if self._created and self.path.is_dir() and self.latest_state() is None:
            self.remove()
        os.close(self._lock_fd)
        self._lock_fd = -1
        for folder in self._created_parents:
            with suppress(OSError):  # for example because it is no longer empty
                folder.rmdir()

    def _states(self) -> list[Path]:
        return [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]


def _is_leftover(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) or name in _TEMPORARY


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _is_complete(folder: Path) -> bool:
    """Whether a state has a marker and every file that the marker lists, with its size."""
    marker = folder / _COMPLETE
    if not marker.is_file():
        return False
    sizes = read_object(marker)["sizes"]
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )
