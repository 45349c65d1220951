"""What of a chain is done: `state.json` in the run's folder, whole after any kill."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import read_object
from diffxfer.checkpoints.filesystem import lock_folder, sync_folder
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import OutputError, OutputExistsError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STATE_NAME = "state.json"
FORMAT = 1


class State:
    """The steps that are done, with what they found; use it as a context manager.

    Args:
        run: the run's folder, which is made.
        recipe: as values that JSON has.
        inputs: what tells one state of each input from another, by its path.
        redo: whether a recipe that changed is taken over, since rounds are to be done again.

    Raises:
        OutputError: if the folder cannot be used, or another run is using it.
        RecipeError: if it was begun by another recipe, or with other inputs.
    """

    def __init__(
        self, run: Path, recipe: Mapping[str, Any], inputs: Mapping[str, str], *, redo: bool
    ) -> None:
        self._run = run
        self._path = run / STATE_NAME
        self._recipe = dict(recipe)
        self._inputs = dict(inputs)
        self.done: dict[str, Any] = {}
        self._lock_fd = -1
        self._open()
        try:
            self._read(redo=redo)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run use the folder."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> None:
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            if not self._path.exists() and any(self._run.iterdir()):
                problem = f"is not empty, and has no {STATE_NAME} of a run"
                raise OutputExistsError(self._run, problem, "choose another -o")
            self._lock_fd = lock_folder(self._run)
        except BlockingIOError as exc:
            problem = "is in use by another run"
            raise OutputError(self._run, problem, "wait for it, or choose another -o") from exc
        except OSError as exc:
            raise write_error(self._run, "", exc) from exc

    def _read(self, *, redo: bool) -> None:
        if not self._path.exists():
            return
        known = read_object(self._path)
        if known.get("format") != FORMAT:
            problem = f"has format {known.get('format')!r}, and this diffxfer reads {FORMAT}"
            raise RecipeError(self._path, problem, "choose another -o")
        self.done = dict(known.get("done", {}))
        if redo:
            return
        remedy = "put it back, choose another -o, or give --from-round to do rounds again"
        for key, was, now in _differences(known.get("recipe", {}), self._recipe):
            problem = f"the recipe changed: {key} was {was} and is {now}"
            raise RecipeError(self._run, problem, remedy)
        for path, was in known.get("inputs", {}).items():
            if self._inputs.get(path) != was:
                raise RecipeError(path, "changed since this run was begun", remedy)

    def forget(self, keys: set[str]) -> None:
        """Take steps for not done."""
        self.done = {key: found for key, found in self.done.items() if key not in keys}

    def finish(self, key: str, found: Any) -> None:
        """Note that a step is done.

        Args:
            key: the step's.
            found: what later steps or the report need of it, as values that JSON has.

        Raises:
            OutputError: if it cannot be written.
        """
        self.done[key] = found
        self.save()

    def save(self) -> None:
        """Write it, whole or not at all, durably.

        Raises:
            OutputError: if it cannot be written.
        """
        document = {
            "format": FORMAT,
            "recipe": self._recipe,
            "inputs": self._inputs,
            "done": self.done,
        }
        partial = self._path.with_suffix(".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
            sync_folder(self._run)
        except OSError as exc:
            raise write_error(self._run, STATE_NAME, exc) from exc


def _differences(
    was: Mapping[str, Any], now: Mapping[str, Any], above: str = ""
) -> list[tuple[str, str, str]]:
    """The keys in which two recipes differ, and what they are in each."""
    found = []
    for key in [*was, *(key for key in now if key not in was)]:
        old, new = was.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{above}{key}.")
        elif old != new:
            found.append((f"{above}{key}", json.dumps(old), json.dumps(new)))
    return found
