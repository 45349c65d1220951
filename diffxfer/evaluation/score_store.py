"""The output folder of an evaluation: lm-eval's files, from which scores are reused.

Each model has a folder with the `results_*.json` and `samples_*.jsonl` of lm-eval, which other
tools can read. The results file is written last, so that the files it refers to are complete.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.companions import companion_path, read_object
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import CheckpointError, CompanionError, OutputError, OutputExistsError
from diffxfer.evaluation.lm_eval_results import read_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lm_eval.loggers import EvaluationTracker

    from diffxfer.evaluation.model_roles import ModelUnderTest
    from diffxfer.evaluation.scores import Score

_OUR_KEY = "diffxfer"
COMPARISON = "comparison.json"
"""The file with the output of `--json`, beside the folders of scores."""

_SAMPLE_FIELDS = ("filter", "doc_hash", "target_hash", "metrics")
_LONGEST = 200
# The exceptions that a corrupt file may cause; its scores are computed again.
_CORRUPT_FILE_ERRORS = (
    *(CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError),
    *(RecursionError, OverflowError),
)


@dataclass(frozen=True, slots=True)
class _StoredScores:
    """A results file that has the scores of a task or group.

    Attributes:
        path: the file.
        leaves: the tasks that have samples.
        groups: the groups that have scores.
        content: the `content_hash` of the model, if it was recorded.
    """

    path: Path
    leaves: tuple[str, ...]
    groups: tuple[str, ...]
    content: str | None


class ScoreStore:
    """Scores on disk.

    Args:
        folder: the output folder, which is created if necessary.
        inputs: the folders that are read, which must not contain the output folder.

    Raises:
        OutputError: if the folder cannot be written to, or is inside an input.
    """

    def __init__(self, folder: Path, inputs: Iterable[Path] = ()) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._by_key: dict[str, _StoredScores] = {}
        real = Path(os.path.realpath(folder))
        for source in (Path(os.path.realpath(path)) for path in inputs):
            if source == real or source in real.parents:
                problem = f"is, or is inside, the input {source}"
                raise OutputExistsError(folder, problem, "choose another --output")
        if any((folder / name).exists() for name in ("config.json", MANIFEST_NAME)):
            problem = "is a model or a diff vector, not a folder of scores"
            raise OutputExistsError(folder, problem, "choose another --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Check that the folder is writable before an hour of scoring.
            with scratch_folder(folder):
                pass
            for path in sorted(folder.glob("*/results_*.json")):
                self._index(path)
        except OSError as exc:
            raise write_error(folder, "", exc) from exc

    def _index(self, path: Path) -> None:
        """Index the scores of a results file; a corrupt file is ignored with a warning."""
        try:
            record = read_object(_regular_file(path)).get(_OUR_KEY)
            record = record if isinstance(record, dict) else {"scored": {}}
            content = record.get("content")
            content = content if isinstance(content, str) else None
            scored = record["scored"]
            for entry in scored.values():
                if entry["key"] is None:  # a server may run another model tomorrow
                    continue
                leaves, groups = tuple(entry["tasks"]), tuple(entry["groups"])
                self._by_key[str(entry["key"])] = _StoredScores(path, leaves, groups, content)
        except _CORRUPT_FILE_ERRORS as exc:
            self.warnings.append(f"{path} is not used: {_reason(exc)}")

    def load(self, key: str) -> list[Score] | None:
        """Load the scores of a task or group; None if they are not stored.

        Args:
            key: the key of what was scored, and how.
        """
        found = self._by_key.get(key)
        if found is None:
            return None
        try:
            scores = _read(found)
        except _CORRUPT_FILE_ERRORS as exc:
            scores, why = None, _reason(exc)
        else:
            why = "samples are missing"
        if scores is None:
            self.warnings.append(f"{found.path} is not used: {why}")
        return scores

    def content_of(self, key: str) -> str | None:
        """The `content_hash` of the model that has a score; None if it is not known.

        Args:
            key: as for `load`.
        """
        found = self._by_key.get(key)
        return None if found is None else found.content

    def save(
        self,
        model: ModelUnderTest,
        content: str | None,
        labels: Sequence[str],
        results: dict[str, Any],
        scored: Mapping[str, Mapping[str, Any]],
        tracker: EvaluationTracker,
    ) -> None:
        """Write the scores of a model in the format of lm-eval, with the keys to load them.

        Args:
            model: the model that was scored.
            content: its `content_hash`; for a graft, that of its temporary folder.
            labels: the names of all models of the run, to give each one a different folder.
            results: the results of lm-eval, including samples.
            scored: the ``key``, ``tasks`` and ``groups`` of each requested task.
            tracker: lm-eval's writer of result files, which was passed to lm-eval.

        Raises:
            OutputError: if the scores cannot be written.
        """
        name = _folder_name(model, labels)
        results[_OUR_KEY] = {
            "model": model.label,
            "alpha": model.alpha,
            "content": content,
            "scored": scored,
        }
        samples = dict(results.pop("samples"))
        general = tracker.general_config_tracker
        general.model_name = general.model_name_sanitized = name
        try:
            with scratch_folder(self.folder) as scratch:
                tracker.output_path = str(scratch)
                tracker.save_results_aggregated(results=results, samples=dict(samples))
                for task, taken in samples.items():
                    tracker.save_results_samples(task_name=task, samples=taken)
                self._move_into_place(
                    scratch / name, getattr(tracker, "date_id", ""), list(samples)
                )
        except OSError as exc:
            raise write_error(self.folder, f"scores of {name}", exc) from exc

    def _move_into_place(self, written: Path, stamp: str, tasks: Sequence[str]) -> None:
        """Move the files of lm-eval, which only logs its failures, to the folder of the model."""
        home = self.folder / written.name
        home.mkdir(exist_ok=True)
        names = [*(f"samples_{task}_{stamp}.jsonl" for task in tasks), f"results_{stamp}.json"]
        for name in names:
            path = written / name
            if not path.is_file():
                problem = f"lm-eval did not write {name}"
                raise OutputError(self.folder, problem, "check the free disk space")
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(home / name)

    def write_comparison(self, comparison: Mapping[str, Any]) -> None:
        """Write `comparison.json` atomically.

        Raises:
            OutputError: if it cannot be written.
        """
        text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
        try:
            with scratch_folder(self.folder) as scratch:
                (scratch / COMPARISON).write_text(text, "utf-8")
                (scratch / COMPARISON).replace(self.folder / COMPARISON)
        except OSError as exc:
            raise write_error(self.folder, COMPARISON, exc) from exc


def _folder_name(model: ModelUnderTest, labels: Sequence[str]) -> str:
    """The name of a model's folder of scores: the last component of its path if it is unique."""
    from lm_eval.utils import sanitize_model_name

    places = {label: Path(label).resolve() for label in labels}
    place = places[model.label]
    alone = [each.name for each in places.values()].count(place.name) == 1
    name = sanitize_model_name(place.name if alone and place.name else str(place).strip("/"))
    if len(name.encode()) > _LONGEST:
        name = f"{name[:40]}-{xxhash.xxh3_64_hexdigest(name.encode())}"
    return name if model.alpha is None else f"{name}+{model.alpha!r}"


def _regular_file(path: Path) -> Path:
    """The path of a file, checked to be a regular file inside its folder.

    Raises:
        CompanionError: if it is missing or anything else.
    """
    found = companion_path(path.parent, path.name)
    if found is None:
        raise CompanionError(path, "is missing", "score it again")
    return found


def _read(found: _StoredScores) -> list[Score] | None:
    """Read the scores of a results file; None if scores or samples are missing."""
    results = read_object(_regular_file(found.path))
    samples = {leaf: list(_read_samples(found.path, leaf)) for leaf in found.leaves}
    asked = {leaf: results["n-samples"][leaf]["effective"] for leaf in found.leaves}
    if not all(_is_complete(samples[leaf], asked[leaf]) for leaf in found.leaves):
        return None
    wanted = (*found.groups, *found.leaves)
    scores = [score for score in read_scores(results, samples) if score.task in wanted]
    return scores if {score.task for score in scores} >= set(found.leaves) else None


def _read_samples(results: Path, task: str) -> Iterator[dict[str, Any]]:
    """Read the samples of a task from the file beside the results, without their texts."""
    stamp = results.stem.removeprefix("results_")
    with _regular_file(results.parent / f"samples_{task}_{stamp}.jsonl").open(
        encoding="utf-8"
    ) as file:
        for line in file:
            sample = json.loads(line)
            kept = (*_SAMPLE_FIELDS, *sample["metrics"])
            yield {field: sample[field] for field in kept}


def _is_complete(samples: list[dict[str, Any]], asked: int) -> bool:
    by_filter = Counter(sample["filter"] for sample in samples)
    return bool(by_filter) and all(count == asked for count in by_filter.values())


def _reason(exc: BaseException) -> str:
    if isinstance(exc, CheckpointError):
        return exc.problem
    return f"it is corrupt ({type(exc).__name__}: {exc})"
