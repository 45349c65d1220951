"""Scoring one model with lm-eval, in this process or on a node of a cluster."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.diffs.grafting.graft import apply_diff
from diffxfer.evaluation.content_hash import content_hash, content_hash_in_memory
from diffxfer.evaluation.request_progress import track_requests
from diffxfer.models.graft import graft_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.loggers import EvaluationTracker

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.evaluation.model_roles import ModelUnderTest
    from diffxfer.models.graft import GraftSource


@dataclass(frozen=True, slots=True)
class ScoringJob:
    """A model, and the tasks on which it is scored.

    Attributes:
        model: the model or graft.
        folder: the folder of the model, or of the target of the graft.
        diff: the folder of the diff vector; None for a model without a graft.
        names: the tasks.
        settings: how to score.
        home: the folder for temporary files; None for the system's.
        stores: whether the scores are stored.
        content: the `content_hash` of the model; None if it is not known, as for a graft.
    """

    model: ModelUnderTest
    folder: Path
    diff: Path | None
    names: tuple[str, ...]
    settings: EvalSettings
    home: Path | None
    stores: bool
    content: str | None


@dataclass(frozen=True, slots=True)
class Answers:
    """What lm-eval says of a model.

    Attributes:
        results: its results, including samples.
        content: the `content_hash` of the model, if scores are stored.
        tracker: lm-eval's writer of result files; None if scores are not stored.
        warnings: what a user should know about the scores, one line each.
    """

    results: dict[str, Any]
    content: str | None
    tracker: EvaluationTracker | None
    warnings: tuple[str, ...]


def score_model(
    job: ScoringJob,
    tasks: TaskSet,
    *,
    told: Callable[[int, int], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
) -> Answers:
    """Let lm-eval score a model.

    Args:
        job: the model, and how it is scored.
        tasks: the loaded tasks, which include those of the job.
        told: called with the numbers of answered and built requests; 0 and 0 before they are built.
        moved: called with the bytes done and the total of a graft or of a model that is loaded.

    Raises:
        DiffxferError: if the model cannot be scored.
    """
    from lm_eval.loggers import EvaluationTracker

    from diffxfer.evaluation.harness import score

    tracker = EvaluationTracker() if job.stores else None
    warnings: list[str] = []
    if told is not None:
        told(0, 0)
    with _open(job, moved) as (folder, graft):
        content = _content_of(job, folder, graft, moved) if job.stores else None
        if told is not None:
            told(0, 0)  # a folder is written by now, and the model is loaded next
        with track_requests(told):
            results = score(
                *(str(folder), str(job.model), tasks, job.names, job.settings, tracker),
                source=graft,
                moved=moved,
                warn=warnings.append,
            )
    if job.stores and job.model.alpha is not None:
        # The folder of a graft is temporary, so its inputs are recorded instead.
        results["config"]["model_args"] = f"pretrained={job.model}"
    return Answers(results, content, tracker, tuple(warnings))


def _content_of(
    job: ScoringJob,
    folder: Path,
    graft: GraftSource | None,
    moved: Callable[[int, int], None] | None,
) -> str | None:
    """The content hash of a model; a graft was not hashed before."""
    if graft is not None:
        return content_hash_in_memory(graft, moved)
    return job.content if job.diff is None else content_hash(folder)


@contextmanager
def _open(
    job: ScoringJob, moved: Callable[[int, int], None] | None
) -> Iterator[tuple[Path, GraftSource | None]]:
    """The folder of a model; for a graft, a temporary one, and its weights if not there."""
    if job.diff is None:
        yield job.folder, None
        return
    alpha = job.model.alpha or 0.0
    made_of = job.diff, job.folder
    if job.settings.grafts_in_memory:
        with graft_source(*made_of, alpha, home=job.home, added=job.settings.added) as graft:
            graft.label = str(job.model)
            yield Path(graft.folder), graft
        return
    with scratch_folder(job.home) as scratch:
        out = scratch / f"{Path(job.model.label).name or 'graft'}+{alpha:g}"
        apply_diff(*made_of, out, alpha=alpha, progress=moved)
        yield out, None
