"""The folder of scores: lm-eval's own files, found again by what was scored.

A folder for each model holds lm-eval's `results_*.json` and `samples_*.jsonl`, which its other
tools read. A results file appears last, so that what it names is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import read_object
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import CheckpointError, OutputError
from diffxfer.evaluation.native import read_scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_eval.loggers import EvaluationTracker

    from diffxfer.evaluation.scores import Score

_OURS = "diffxfer"
_COMPARISON = "comparison.json"
_SAMPLE_FIELDS = ("filter", "doc_hash", "target_hash", "metrics")


@dataclass(frozen=True, slots=True)
class _Found:
    """A file of results that holds the scores of one task or group.

    Attributes:
        path: the file.
        leaves: the tasks whose samples belong to them.
        groups: the groups that have scores of their own.
    """

    path: Path
    leaves: tuple[str, ...]
    groups: tuple[str, ...]


class Store:
    """Scores on disk.

    Args:
        folder: where they are; it is made if it is missing.

    Raises:
        OutputError: if it cannot be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._by_key: dict[str, _Found] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*/results_*.json")):
                self._index(path)
        except OSError as exc:
            raise write_error(folder, "", exc) from exc

    def _index(self, path: Path) -> None:
        """Note what a file of results holds; one that is broken is as if it were not there."""
        try:
            record = read_object(path).get(_OURS)
            scored = record["scored"] if isinstance(record, dict) else {}
            for entry in scored.values():
                if entry["key"] is None:  # what a server answered may be another model's tomorrow
                    continue
                leaves, groups = tuple(entry["tasks"]), tuple(entry["groups"])
                self._by_key[str(entry["key"])] = _Found(path, leaves, groups)
        except (CheckpointError, KeyError, TypeError, AttributeError) as exc:
            self.warnings.append(f"{path} is not used: {_why(exc)}")

    def tracker(self) -> EvaluationTracker:
        """lm-eval's writer of files, to be told of a run before it is saved."""
        from lm_eval.loggers import EvaluationTracker

        return EvaluationTracker(output_path=str(self.folder))

    def find(self, key: str) -> list[Score] | None:
        """The scores of a task or group, if they are there.

        Args:
            key: what was scored, and how.
        """
        found = self._by_key.get(key)
        if found is None:
            return None
        try:
            scores = _read(found)
        except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError) as exc:
            scores, why = None, _why(exc)
        else:
            why = "samples are missing"
        if scores is None:
            self.warnings.append(f"{found.path} is not used: {why}")
        return scores

    def save(
        self,
        label: str,
        alpha: float | None,
        results: dict[str, Any],
        scored: Mapping[str, Mapping[str, Any]],
        tracker: EvaluationTracker,
    ) -> None:
        """Write a model's scores as lm-eval does, and so that they are found again.

        Args:
            label: what a person calls the model.
            alpha: the scale of a graft on it; None for the model as it is.
            results: what lm-eval gave, with its samples.
            scored: by name that was asked for, its ``key``, ``tasks`` and ``groups``.
            tracker: the one of `tracker` that lm-eval was given.

        Raises:
            OutputError: if they cannot be written.
        """
        from lm_eval.utils import sanitize_model_name

        name = label if alpha is None else f"{label}+{alpha:g}"
        results[_OURS] = {"model": label, "alpha": alpha, "scored": scored}
        try:
            scratch = Path(mkdtemp(prefix=".partial-", dir=self.folder))
            try:
                self._write(scratch, sanitize_model_name(name.strip("/")), results, tracker)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as exc:
            raise write_error(self.folder, name, exc) from exc

    def _write(
        self, scratch: Path, name: str, results: dict[str, Any], tracker: EvaluationTracker
    ) -> None:
        samples = dict(results.pop("samples"))
        tracker.output_path = str(scratch)
        general = tracker.general_config_tracker
        general.model_name = general.model_name_sanitized = name
        tracker.save_results_aggregated(results=results, samples=dict(samples))
        for task, taken in samples.items():
            tracker.save_results_samples(task_name=task, samples=taken)
        home = self.folder / name
        home.mkdir(exist_ok=True)
        # lm-eval names its files by the time, and only logs what it could not write.
        stamp = getattr(tracker, "date_id", "")
        names = [*(f"samples_{task}_{stamp}.jsonl" for task in samples), f"results_{stamp}.json"]
        for file_name in names:
            path = scratch / name / file_name
            if not path.is_file():
                problem = f"lm-eval could not write {file_name}"
                raise OutputError(self.folder, problem, "check the disk and its space")
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(home / file_name)

    def write_comparison(self, comparison: Mapping[str, Any]) -> None:
        """Write `comparison.json`, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        path = self.folder / _COMPARISON
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(comparison, indent=2) + "\n", "utf-8")
            partial.replace(path)
        except OSError as exc:
            raise write_error(self.folder, _COMPARISON, exc) from exc


def _read(found: _Found) -> list[Score] | None:
    """The scores in a file of results; None if samples of theirs are missing."""
    results = read_object(found.path)
    samples = {leaf: list(_read_samples(found.path, leaf)) for leaf in found.leaves}
    asked = {leaf: results["n-samples"][leaf]["effective"] for leaf in found.leaves}
    if not all(_is_whole(samples[leaf], asked[leaf]) for leaf in found.leaves):
        return None
    wanted = (*found.groups, *found.leaves)
    return [score for score in read_scores(results, samples) if score.task in wanted]


def _read_samples(results: Path, task: str) -> Iterator[dict[str, Any]]:
    """What the samples of a task counted for, from the file beside the results."""
    stamp = results.stem.removeprefix("results_")
    with (results.parent / f"samples_{task}_{stamp}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            sample = json.loads(line)
            kept = (*_SAMPLE_FIELDS, *sample["metrics"])
            yield {field: sample[field] for field in kept}


def _is_whole(samples: list[dict[str, Any]], asked: int) -> bool:
    by_filter: defaultdict[str, int] = defaultdict(int)
    for sample in samples:
        by_filter[sample["filter"]] += 1
    return bool(by_filter) and all(count == asked for count in by_filter.values())


def _why(exc: BaseException) -> str:
    if isinstance(exc, CheckpointError):
        return exc.problem
    return f"it is not whole ({exc})"
