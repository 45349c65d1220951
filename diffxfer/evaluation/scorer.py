"""Scoring one model after the other, each on the tasks that it was not scored on before."""

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

from diffxfer.diffs.graft import apply_diff
from diffxfer.errors import DiskSpaceError, MatchError, RelatednessError
from diffxfer.evaluation.content_hash import content_hash
from diffxfer.evaluation.request_progress import track_requests
from diffxfer.evaluation.score_rows import ScoredModel
from diffxfer.evaluation.scratch import scratch_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.evaluation.model_roles import ModelRoles, ModelUnderTest
    from diffxfer.evaluation.score_store import ScoreStore
    from diffxfer.evaluation.scores import Score

_DRY_RUN_NAME = ".diffxfer-graft"
_VERSIONED_PACKAGES = ("lm-eval", "transformers", "torch", "vllm", "sglang")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What is called on the way.

    Attributes:
        tell: called with a line on what is done next.
        moved: called with the bytes done and the bytes in all.
        answered: called with a model, its requests answered and its requests in all.
        opened: called with the output folder.
    """

    tell: Callable[[str], None]
    moved: Callable[[int, int], None] | None = None
    answered: Callable[[str, int, int], None] | None = None
    opened: Callable[[Path], None] | None = None


@dataclass(frozen=True, slots=True)
class Scorer:
    """What scoring takes, checked.

    Attributes:
        roles: what is scored.
        settings: how.
        tasks: on what.
        store: where scores are kept and found again; None for nowhere.
        callbacks: what is called on the way.
        contents: hashes of the folders that were read so far.
    """

    roles: ModelRoles
    settings: EvalSettings
    tasks: TaskSet
    store: ScoreStore | None
    callbacks: Callbacks
    contents: dict[Path, str] = field(default_factory=dict)

    def score(self, model: ModelUnderTest, done: list[ScoredModel]) -> None:
        """Score one model, and only then keep its scores on disk.

        Args:
            model: one of the roles.
            done: where its scores are appended.

        Raises:
            DiffxferError: if it cannot be scored, or, with its scores appended, not be kept.
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
            The scores, the content of what was scored if scores are kept, and what keeps them.
        """
        from diffxfer.evaluation.harness import score
        from diffxfer.evaluation.lm_eval_results import read_scores

        store, tasks = self.store, self.tasks
        tracker = None if store is None else store.tracker()
        told = self._request_callback(model, place)
        if told is not None:
            told(0, 0)
        with self._model_folder(model) as folder:
            content = None if store is None else self._content_of(model, folder)
            if told is not None:
                told(0, 0)  # the graft is made, and the model is loaded
            with track_requests(told):
                results = score(folder, str(model), tasks, names, self.settings, tracker)
        fresh = read_scores(results, results["samples"])
        entries = {name: (*tasks.groups[name], *tasks.leaves[name]) for name in names}
        scores = {name: [one for one in fresh if one.task in entries[name]] for name in names}
        if store is None or tracker is None:
            return scores, None, _keep_nothing
        if model.alpha is not None:
            # The folder that was scored is gone: what it was made from says more than its name.
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
        """What is told of a model's requests, under a name that is short."""
        answered = self.callbacks.answered
        if answered is None:
            return None
        name = str(replace(model, label=Path(model.label).name or model.label))
        return partial(answered, f"{name} ({place.replace(' of ', '/')})")

    def _content_of(self, model: ModelUnderTest, folder: str) -> str | None:
        """What tells the folder that is scored from others; a graft is read for it."""
        if not self.settings.reads_folders:
            return None
        return self.contents[Path(folder)] if model.diff is None else content_hash(Path(folder))

    def _cache_keys(self, model: ModelUnderTest) -> dict[str, str | None]:
        """By task, what tells this score from any other; None where that is not known."""
        names = self.tasks.names
        if self.store is None or not self.settings.reads_folders:
            return dict.fromkeys(names)
        named: list[str | Path] = [model.label]
        named += [] if model.diff is None else [model.diff]
        made_of = [self.roles.folder(name) for name in named]
        for name, folder in zip(named, made_of, strict=True):
            if folder not in self.contents:
                self.callbacks.tell(f"reading {name}, to know it again")
                self.contents[folder] = content_hash(folder)
        made_by = [] if model.diff is None else [version("diffxfer"), model.alpha]
        shared = [
            [self.contents[folder] for folder in made_of],
            [*map(_version, _VERSIONED_PACKAGES), *made_by],
            self.settings.cache_key_fields(),
            # Where text is sampled, what is asked before shapes what is drawn.
            self.tasks.fingerprints if self.tasks.sampled else [],
        ]
        return {name: _digest([*shared, self.tasks.fingerprints[name]]) for name in names}

    @contextmanager
    def _model_folder(self, model: ModelUnderTest) -> Iterator[str]:
        """The folder of a model; of a graft, one that is made now and gone afterwards."""
        if model.diff is None:
            yield str(self.roles.folder(model.label))
            return
        with scratch_folder(None if self.store is None else self.store.folder) as scratch:
            alpha = model.alpha or 0.0
            out = scratch / f"{Path(model.label).name or 'graft'}+{alpha:g}"
            folders = self.roles.folder(model.diff), self.roles.folder(model.label)
            apply_diff(*folders, out, alpha=alpha, progress=self.callbacks.moved)
            yield str(out)


def check_grafts(roles: ModelRoles, output: Path | None) -> tuple[str, ...]:
    """See that grafts can be made, before anything is scored.

    Args:
        roles: what is to be scored.
        output: the folder of scores, where grafts are made; None for that of temporary files.

    Returns:
        What should be known of the grafts, one line each.

    Raises:
        DiffxferError: if the diff vector does not fit the target, or the disk is too small.
    """
    from diffxfer.diffs.matching.refusal import refusal

    if roles.diff is None:
        return ()
    home = output or Path(gettempdir())
    try:
        report = apply_diff(roles.diff, roles.target, home / _DRY_RUN_NAME, dry_run=True)
        if report.refused:
            raise refusal(report.refused)
    except (MatchError, RelatednessError) as exc:
        exc.remedy += "; diffxfer apply has these options: give the graft it makes as a MODEL"
        raise
    if report.bytes_to_write > report.free_bytes:
        problem = (
            f"a graft takes {report.bytes_to_write:,} bytes, and {report.free_bytes:,} are free"
        )
        raise DiskSpaceError(home, problem, "give --output on a larger disk, or set TMPDIR")
    return report.warnings


def _keep_nothing() -> None:
    """Keep nothing."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
