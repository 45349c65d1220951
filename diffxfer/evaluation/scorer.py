"""Scoring models one by one, each on the tasks without a stored score."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.diffs.grafting.graft import apply_diff
from diffxfer.errors import DiskSpaceError, MatchError, RelatednessError, VocabularyError
from diffxfer.evaluation.content_hash import content_hash
from diffxfer.evaluation.score_model import ScoringJob, score_model
from diffxfer.evaluation.score_rows import ScoredModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.evaluation.model_roles import ModelRoles, ModelUnderTest
    from diffxfer.evaluation.score_model import Answers
    from diffxfer.evaluation.score_store import ScoreStore
    from diffxfer.evaluation.scores import Score

_DRY_RUN_NAME = ".diffxfer-graft"
VERSIONED_PACKAGES = ("lm-eval", "transformers", "torch", "vllm", "sglang")
"""The packages whose version a score may depend on."""


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
class Lookup:
    """What is stored of a model.

    Attributes:
        model: the model.
        keys: the key of each score by task; None for a model without a known content.
        known: the stored scores by task.
        content: the `content_hash` of the model that has them, if it is known.
    """

    model: ModelUnderTest
    keys: Mapping[str, str | None]
    known: Mapping[str, list[Score]]
    content: str | None


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
    """

    roles: ModelRoles
    settings: EvalSettings
    tasks: TaskSet
    store: ScoreStore | None
    callbacks: Callbacks
    contents: dict[Path, str] = field(default_factory=dict)

    def look_up(self, model: ModelUnderTest) -> Lookup:
        """Load the stored scores of a model.

        Args:
            model: one of the models of `roles`.
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
        return Lookup(model, keys, known, content)

    def score(self, model: ModelUnderTest, done: dict[ModelUnderTest, ScoredModel]) -> None:
        """Score one model, add its scores to a mapping, and then store them.

        Args:
            model: one of the models of `roles`.
            done: the mapping to add to.

        Raises:
            DiffxferError: if the model cannot be scored, or its scores cannot be stored; in the
                latter case they are in the mapping.
        """
        lookup = self.look_up(model)
        missing = self.missing(lookup)
        answers = None
        if missing:
            place = f"{self.roles.models.index(model) + 1} of {len(self.roles.models)}"
            self.callbacks.tell(f"scoring {model} ({place}) on {', '.join(missing)}")
            told = self._request_callback(model, place)
            answers = score_model(
                self.job(lookup), self.tasks, told=told, moved=self.callbacks.moved
            )
        self.take(lookup, answers, done)

    def missing(self, lookup: Lookup) -> tuple[str, ...]:
        """The tasks of which a model has no stored scores."""
        return tuple(name for name in self.tasks.names if name not in lookup.known)

    def job(self, lookup: Lookup) -> ScoringJob:
        """What is left to do for a model.

        Args:
            lookup: the result of `look_up`.
        """
        model, store = lookup.model, self.store
        folder = self.roles.folder(model.label)
        return ScoringJob(
            model=model,
            folder=folder,
            diff=None if model.diff is None else self.roles.folder(model.diff),
            names=self.missing(lookup),
            settings=self.settings,
            home=None if store is None else store.folder,
            stores=store is not None,
            content=self.contents.get(folder) if model.diff is None else None,
        )

    def take(
        self,
        lookup: Lookup,
        answers: Answers | None,
        done: dict[ModelUnderTest, ScoredModel],
    ) -> None:
        """Add the scores of a model to a mapping, and then store those that are new.

        Args:
            lookup: the result of `look_up`.
            answers: what lm-eval says of the model; None if all its scores were stored.
            done: the mapping to add to.

        Raises:
            DiffxferError: if the scores cannot be stored; they are in the mapping then.
        """
        from diffxfer.evaluation.lm_eval_results import read_scores

        model, tasks, names = lookup.model, self.tasks, self.missing(lookup)
        known, content = dict(lookup.known), lookup.content
        if answers is not None:
            content = answers.content
            fresh = read_scores(answers.results, answers.results["samples"])
            for name in names:
                entries = (*tasks.groups[name], *tasks.leaves[name])
                known[name] = [one for one in fresh if one.task in entries]
        scores = {found.column: found for name in tasks.names for found in known[name]}
        done[model] = ScoredModel(
            *(model.label, model.alpha, tuple(scores.values())),
            reused=bool(lookup.known),
            content=content,
            warnings=() if answers is None else answers.warnings,
        )
        if self.store is None or answers is None or answers.tracker is None:
            return
        scored = {
            name: {
                "key": lookup.keys[name],
                "tasks": tasks.leaves[name],
                "groups": tasks.groups[name],
            }
            for name in names
        }
        labels = self.roles.labels()
        self.store.save(model, content, labels, answers.results, scored, answers.tracker)

    def _request_callback(
        self, model: ModelUnderTest, place: str
    ) -> Callable[[int, int], None] | None:
        """The callback for the requests of a model, with a short name of the model."""
        answered = self.callbacks.answered
        if answered is None:
            return None
        name = str(replace(model, label=Path(model.label).name or model.label))
        return partial(answered, f"{name} ({place.replace(' of ', '/')})")

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
            [*map(version_of, VERSIONED_PACKAGES), *made_by],
            self.settings.cache_key_fields(),
            # With sampling, the answers also depend on the tasks that were asked before.
            self.tasks.fingerprints if self.tasks.sampled else [],
        ]
        return {name: _digest([*shared, self.tasks.fingerprints[name]]) for name in names}


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


def version_of(package: str) -> str:
    """The version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
