"""Scoring models one by one, each on the tasks without a stored score."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.diffs.grafting.graft import apply_diff
from diffxfer.errors import DiskSpaceError, MatchError, RelatednessError, VocabularyError
from diffxfer.evaluation.content_hash import content_hash, content_hash_in_memory
from diffxfer.evaluation.request_progress import track_requests
from diffxfer.evaluation.score_rows import ScoredModel
from diffxfer.models.graft import graft_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.evaluation.model_roles import ModelRoles, ModelUnderTest
    from diffxfer.evaluation.score_store import ScoreStore
    from diffxfer.evaluation.scores import Score
    from diffxfer.models.graft import GraftSource

_DRY_RUN_NAME = ".diffxfer-graft"
_VERSIONED_PACKAGES = ("lm-eval", "transformers", "torch", "vllm", "sglang")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The callbacks of an evaluation.

    Attributes:
        tell: called with a line about the next work.
        moved: called with the bytes done and the total.
        answered: called with a model, the number of its answered requests and the total.
        opened: called with the output folder.
    """

    tell: Callable[[str], None]
    moved: Callable[[int, int], None] | None = None
    answered: Callable[[str, int, int], None] | None = None
    opened: Callable[[Path], None] | None = None


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores models, with inputs that are checked.

    Attributes:
        roles: the models.
        settings: how to score.
        tasks: the tasks to score on.
        store: the scores on disk; None to store none.
        callbacks: the callbacks.
        contents: the hashes of the folders that were read so far.
        warnings: what a user should know about the scores, one line each.
    """

    roles: ModelRoles
    settings: EvalSettings
    tasks: TaskSet
    store: ScoreStore | None
    callbacks: Callbacks
    contents: dict[Path, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def score(self, model: ModelUnderTest, done: list[ScoredModel]) -> None:
        """Score one model, append its scores to a list, and then store them.

        Args:
            model: one of the models of `roles`.
            done: the list to append to.

        Raises:
            DiffxferError: if the model cannot be scored, or its scores cannot be stored; in the
                latter case they are in the list.
        """
        keys = self._cache_keys(model)
        known: dict[str, list[Score]] = {}
        content = None
        if self.store is not None:
            found = {name: self.store.load(key) for name, key in keys.items() if key}
            known = {name: scores for name, scores in found.items() if scores is not None}
            contents = (self.store.content_of(keys[name] or "") for name in known)
            content = next(filter(None, contents), None)
            if known:
                named = ", ".join(known)
                self.callbacks.tell(
                    f"{model}: scores on {named} are reused from {self.store.folder}"
                )
        reused = bool(known)
        missing = [name for name in self.tasks.names if name not in known]
        keep = _keep_nothing
        if missing:
            place = f"{self.roles.models.index(model) + 1} of {len(self.roles.models)}"
            self.callbacks.tell(f"scoring {model} ({place}) on {', '.join(missing)}")
            fresh, content, keep = self._run_harness(model, missing, keys, place)
            known |= fresh
        scores = {found.column: found for name in self.tasks.names for found in known[name]}
        scored = tuple(scores.values())
        done.append(ScoredModel(model.label, model.alpha, scored, reused, content))
        keep()

    def _run_harness(
        self,
        model: ModelUnderTest,
        names: Sequence[str],
        keys: Mapping[str, str | None],
        place: str,
    ) -> tuple[dict[str, list[Score]], str | None, Callable[[], None]]:
        """Let lm-eval score a model.

        Returns:
            The scores by task, the content hash of the model if scores are stored, and a function
            that stores them.
        """
        from diffxfer.evaluation.harness import score
        from diffxfer.evaluation.lm_eval_results import read_scores

        store, tasks = self.store, self.tasks
        tracker = None if store is None else store.tracker()
        told = self._request_callback(model, place)
        if told is not None:
            told(0, 0)
        with self._open(model) as (folder, graft):
            content = None if store is None else self._content_of(model, folder, graft)
            if told is not None:
                told(0, 0)  # a folder is written by now, and the model is loaded next
            with track_requests(told):
                moved = self.callbacks.moved
                results = score(
                    *(folder, str(model), tasks, names, self.settings, tracker, graft, moved),
                    warn=self.warnings.append,
                )
        fresh = read_scores(results, results["samples"])
        entries = {name: (*tasks.groups[name], *tasks.leaves[name]) for name in names}
        scores = {name: [one for one in fresh if one.task in entries[name]] for name in names}
        if store is None or tracker is None:
            return scores, None, _keep_nothing
        if model.alpha is not None:
            # The folder of a graft is temporary, so its inputs are recorded instead.
            results["config"]["model_args"] = f"pretrained={model}"
        scored = {
            name: {"key": keys[name], "tasks": tasks.leaves[name], "groups": tasks.groups[name]}
            for name in names
        }
        labels = self.roles.labels()

        def keep() -> None:
            store.save(model, content, labels, results, scored, tracker)

        return scores, content, keep

    def _request_callback(
        self, model: ModelUnderTest, place: str
    ) -> Callable[[int, int], None] | None:
        """The callback for the requests of a model, with a short name of the model."""
        answered = self.callbacks.answered
        if answered is None:
            return None
        name = str(replace(model, label=Path(model.label).name or model.label))
        return partial(answered, f"{name} ({place.replace(' of ', '/')})")

    def _content_of(
        self, model: ModelUnderTest, folder: str, graft: GraftSource | None
    ) -> str | None:
        """The content hash of a model; a graft was not hashed before."""
        if not self.settings.reads_folders:
            return None
        if graft is not None:
            return content_hash_in_memory(graft, self.callbacks.moved)
        return self.contents[Path(folder)] if model.diff is None else content_hash(Path(folder))

    def _cache_keys(self, model: ModelUnderTest) -> dict[str, str | None]:
        """The key of each stored score by task; None if the model has no known content."""
        names = self.tasks.names
        if self.store is None or not self.settings.reads_folders:
            return dict.fromkeys(names)
        named: list[str | Path] = [model.label]
        named += [] if model.diff is None else [model.diff]
        made_of = [self.roles.folder(name) for name in named]
        for name, folder in zip(named, made_of, strict=True):
            if folder not in self.contents:
                self.callbacks.tell(f"hashing {name}")
                self.contents[folder] = content_hash(folder)
        ours = model.diff is not None or self.settings.is_classifier
        made_by = [version("diffxfer"), model.alpha] if ours else []
        shared = [
            [self.contents[folder] for folder in made_of],
            [*map(_version, _VERSIONED_PACKAGES), *made_by],
            self.settings.cache_key_fields(),
            # With sampling, the answers also depend on the tasks that were asked before.
            self.tasks.fingerprints if self.tasks.sampled else [],
        ]
        return {name: _digest([*shared, self.tasks.fingerprints[name]]) for name in names}

    @contextmanager
    def _open(self, model: ModelUnderTest) -> Iterator[tuple[str, GraftSource | None]]:
        """The folder of a model; for a graft, a temporary one, and its weights if not there."""
        if model.diff is None:
            yield str(self.roles.folder(model.label)), None
            return
        alpha = model.alpha or 0.0
        made_of = self.roles.folder(model.diff), self.roles.folder(model.label)
        home = None if self.store is None else self.store.folder
        if self.settings.grafts_in_memory:
            with graft_source(*made_of, alpha, home=home, added=self.settings.added) as graft:
                graft.label = str(model)
                yield str(graft.folder), graft
            return
        with scratch_folder(home) as scratch:
            out = scratch / f"{Path(model.label).name or 'graft'}+{alpha:g}"
            apply_diff(*made_of, out, alpha=alpha, progress=self.callbacks.moved)
            yield str(out), None


def check_grafts(roles: ModelRoles, output: Path | None, settings: EvalSettings) -> tuple[str, ...]:
    """Check by a dry run that grafts can be made.

    Args:
        roles: the models and the diff vector.
        output: the folder of scores, in which grafts are written; None for the system's temporary
            folder.
        settings: how they are scored.

    Returns:
        Warnings about the grafts, one line each.

    Raises:
        DiffxferError: if the diff vector does not match the target, or the disk is too small.
    """
    from diffxfer.diffs.matching.refusal import refusal

    if roles.diff is None:
        return ()
    home = output or Path(gettempdir())
    try:
        out = home / _DRY_RUN_NAME
        report = apply_diff(roles.diff, roles.target, out, added=settings.added, dry_run=True)
        if report.refused:
            raise refusal(report.refused)
    except (MatchError, RelatednessError, VocabularyError) as exc:
        exc.remedy += (
            "; use these options with diffxfer apply, and give the graft it makes as a MODEL"
        )
        raise
    if not settings.grafts_in_memory and report.bytes_to_write > report.free_bytes:
        needed, free = report.bytes_to_write, report.free_bytes
        problem = f"a graft needs {needed:,} bytes, but only {free:,} are free"
        raise DiskSpaceError(home, problem, "give --output on a larger disk, or set TMPDIR")
    return report.warnings


def _keep_nothing() -> None:
    """Store nothing."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
