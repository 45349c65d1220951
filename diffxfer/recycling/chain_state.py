"""The progress of a chain: `state.json` in the folder of the run, written atomically."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.atomic_write import write_atomically
from diffxfer.checkpoints.companions import read_object
from diffxfer.checkpoints.filesystem import lock_folder
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import OutputError, OutputExistsError, RecipeError
from diffxfer.recycling.recipe import with_defaults

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

STATE_NAME = "state.json"
FORMAT = 1
_ANY_ROUND = 1 << 32


class ChainState:
    """The steps that are done and their results; a context manager that locks the folder.

    Args:
        run: the folder of the run, which is created if necessary.
        recipe: the recipe as JSON values.
        inputs: the fingerprint of each input, by path.
        from_round: the first round to repeat. The recipe may have changed for this round and later
            ones. None to continue.

    Attributes:
        done: the result of each step, by key.
        mixed_recipes: whether the rounds that are kept were run with a different recipe.

    Raises:
        OutputError: if the folder cannot be used, or another run is using it.
        RecipeError: if the run began with a different recipe or different inputs.
    """

    def __init__(
        self,
        run: Path,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        from_round: int | None,
    ) -> None:
        self._run = run
        self._path = run / STATE_NAME
        self._recipe = dict(recipe)
        self._inputs = dict(inputs)
        self.done: dict[str, Any] = {}
        self.mixed_recipes = False
        self._lock_fd = -1
        self._open()
        try:
            self._read(from_round)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ChainState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> None:
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            # A run that was killed may have left its first state half written.
            partial = self._path.with_suffix(".partial")
            others = (path for path in self._run.iterdir() if path != partial)
            if not self._path.exists() and any(others):
                problem = f"is not empty, and has no {STATE_NAME}"
                raise OutputExistsError(self._run, problem, "choose another -o")
            self._lock_fd = lock_folder(self._run)
        except BlockingIOError as exc:
            problem = "is in use by another run"
            raise OutputError(self._run, problem, "wait for it, or choose another -o") from exc
        except OSError as exc:
            raise write_error(self._run, "", exc) from exc

    def _read(self, from_round: int | None) -> None:
        if not self._path.exists():
            return
        known = read_object(self._path)
        if known.get("format") != FORMAT:
            problem = f"has format {known.get('format')!r}, but this version reads {FORMAT}"
            raise RecipeError(self._path, problem, "choose another -o")
        self.done = dict(known.get("done", {}))
        # A key that was introduced after the run began had its default value.
        begun = with_defaults(known.get("recipe", {}))
        for key, was, now in _differences(begun, self._recipe):
            first = _first_round(key)
            if from_round is None or first < from_round:
                problem = f"the recipe changed: {key} was {was} and is {now}"
                raise RecipeError(self._run, problem, _remedy(first))
            self.mixed_recipes |= not key.startswith("bases.")
        for path, was in known.get("inputs", {}).items():
            keys = _keys_of(path, begun)
            first = min(map(_first_round, keys), default=_ANY_ROUND)
            if self._inputs.get(path) == was:
                continue
            if from_round is not None and from_round <= first:
                self.mixed_recipes |= not (keys and all(key.startswith("bases.") for key in keys))
                continue
            raise RecipeError(path, "changed since this run began", _remedy(first))

    def forget(self, keys: set[str]) -> None:
        """Remove steps from those that are done, by key."""
        self.done = {key: found for key, found in self.done.items() if key not in keys}

    def record(self, key: str, found: Any) -> None:
        """Record that a step is done, and save the state.

        Args:
            key: the key of the step.
            found: its result, as JSON values.

        Raises:
            OutputError: if it cannot be written.
        """
        # The same values that a later run reads: tuples become lists.
        self.done[key] = json.loads(json.dumps(found))
        self.save()

    def order(self, keys: Iterable[str]) -> None:
        """Put the steps in order, after several have run at once, and save the state.

        Args:
            keys: the keys of all steps.

        Raises:
            OutputError: if it cannot be written.
        """
        self.done = {key: self.done[key] for key in keys if key in self.done} | self.done
        self.save()

    def save(self) -> None:
        """Write the state file atomically and durably.

        Raises:
            OutputError: if it cannot be written.
        """
        document = {
            "format": FORMAT,
            "recipe": self._recipe,
            "inputs": self._inputs,
            "done": self.done,
        }
        try:
            write_atomically(self._path, json.dumps(document, indent=2).encode())
        except OSError as exc:
            raise write_error(self._run, STATE_NAME, exc) from exc


def _remedy(first: int) -> str:
    again = f"--from-round {first}" if first < _ANY_ROUND else "--from-round"
    return f"restore it, choose another -o, or give {again} to repeat rounds"


def _first_round(key: str) -> int:
    """The first round that a recipe key affects; a large number if only the user can know."""
    name, _, rest = key.partition(".")
    if name == "bases" and rest.isdigit():
        return int(rest) + 1
    return {"finetuned": 1, "mode": 2}.get(name, _ANY_ROUND)


def _keys_of(path: str, recipe: Mapping[str, Any]) -> list[str]:
    """The recipe keys whose value is this path; none for a file that a command names."""
    return [key for key, value in _leaves(recipe) if value == path]


def _leaves(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither a mapping nor a list, with its dotted key."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _leaves(inner, f"{above}.{key}" if above else str(key))
    else:
        yield above, value


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The keys in which two recipes differ, with both values as JSON."""
    old, new = dict(_leaves(was)), dict(_leaves(now))
    for key in dict.fromkeys((*old, *new)):
        if (key in old, old.get(key)) != (key in new, new.get(key)):
            before, after = (
                json.dumps(known[key]) if key in known else "absent" for known in (old, new)
            )
            yield key, before, after
