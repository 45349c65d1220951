"""Scoring several models at once on a cluster: one piece of work a model or graft.

The driver looks scores up, compares and stores; a node loads the model, or makes the graft in its
memory, and asks lm-eval.
"""

from __future__ import annotations

import os
import time
import traceback
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.cluster.node_work import SAME, other_version
from diffxfer.errors import ClusterError, DiffxferError, OptionError
from diffxfer.evaluation.content_hash import shards_of
from diffxfer.evaluation.score_model import score_model
from diffxfer.evaluation.scorer import VERSIONED_PACKAGES, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.model_roles import ModelUnderTest
    from diffxfer.evaluation.score_model import Answers, ScoringJob
    from diffxfer.evaluation.score_rows import ScoredModel
    from diffxfer.evaluation.scorer import Scorer
    from diffxfer.streaming.distribute import Cluster

PROCESS_BYTES = 1_000_000_000
"""The memory of a process that has imported torch, transformers and lm-eval, without a model."""
_BITS = 32


@dataclass(frozen=True, slots=True)
class ScoringCluster:
    """A cluster on which models are scored.

    Attributes:
        cluster: the cluster.
        gpus: GPUs of a model.
    """

    cluster: Cluster
    gpus: float


def choose_cluster(
    cluster: Cluster | None, gpus_per_model: float | None, settings: EvalSettings
) -> tuple[ScoringCluster | None, EvalSettings]:
    """Check where models are scored, and decide on how many GPUs.

    Args:
        cluster: the cluster; None for this process.
        gpus_per_model: the number that was asked for; None for 1 if a node has GPUs and the device
            is not another.
        settings: how to score.

    Returns:
        The cluster with the number of GPUs, and the settings with the device of the nodes.

    Raises:
        OptionError: if the options do not fit together.
    """
    refuse_gpus_without_cluster(cluster, gpus_per_model)
    if cluster is None:
        return None, settings
    if not settings.reads_folders:
        problem = f"loads models on nodes, but the backend {settings.backend} asks a server"
        raise OptionError("--ray", problem, "omit it: a server needs no cluster")
    gpus = count_gpus(cluster, gpus_per_model, settings.device)
    if settings.in_process and settings.device is None:
        settings = replace(settings, device="cuda" if gpus else "cpu")
    return ScoringCluster(cluster, gpus), settings


def refuse_gpus_without_cluster(cluster: Cluster | None, gpus_per_model: float | None) -> None:
    """Refuse a number of GPUs for this process, which uses those that it finds.

    Raises:
        OptionError: if it is given without a cluster.
    """
    if cluster is None and gpus_per_model is not None:
        problem = "is for a cluster"
        raise OptionError("--gpus-per-model", problem, "give --ray too, or omit it")


def count_gpus(cluster: Cluster, wanted: float | None, device: str | None) -> float:
    """The number of GPUs of a piece of work.

    Args:
        cluster: the cluster.
        wanted: the number that was asked for; None for 1 if a node has GPUs and the device is not
            another.
        device: the device that was asked for, if any.

    Raises:
        OptionError: if Ray has no such share, no node has so many, or it does not fit the device.
        ClusterError: if the device is a GPU, and no node has one.
    """
    on_gpu = device is not None and device.startswith("cuda")
    there = cluster.most_gpus()
    if on_gpu and not there:
        problem = f"no node has a GPU for Ray, which the device {device} needs"
        raise ClusterError("--ray", problem, "start nodes with GPUs, or name the device cpu")
    if wanted is None:
        return float(there > 0 and (on_gpu or device is None))
    option = "--gpus-per-model"
    if not (wanted >= 0 and (wanted <= 1 or float(wanted).is_integer())):
        problem = f"{wanted:g} is neither a share of a GPU nor a number of GPUs"
        raise OptionError(option, problem, "give a share below 1, or a whole number")
    if wanted and device is not None and not on_gpu:
        problem = f"has no effect with the device {device}"
        raise OptionError(option, problem, "omit it, or give --device cuda")
    if not wanted and on_gpu:
        raise OptionError(option, f"0 leaves no GPU for the device {device}", "give 1, or omit it")
    if wanted > there:
        problem = f"no node has {wanted:g} GPUs for Ray; the most that one has is {there:g}"
        raise OptionError(option, problem, "give fewer, or start nodes with more")
    return wanted


@dataclass(frozen=True, slots=True)
class _Piece:
    """A job as it is sent to a node.

    Attributes:
        job: the job.
        folder: the current folder of the driver, to which names of files are relative.
        versions: the versions of the driver, by package.
    """

    job: ScoringJob
    folder: Path
    versions: Mapping[str, str]


def score_on_cluster(
    scorer: Scorer, where: ScoringCluster, done: dict[ModelUnderTest, ScoredModel]
) -> None:
    """Score the models whose scores are not stored, each somewhere on a cluster.

    Args:
        scorer: the models, and how they are scored; it stores the scores as they come.
        where: the cluster.
        done: the mapping to add scored models to.

    Raises:
        DiffxferError: for the first model in their order that fails; those before it are scored.
    """
    lookups = [scorer.look_up(model) for model in scorer.roles.models]
    pending = [lookup for lookup in lookups if scorer.missing(lookup)]
    for lookup in lookups:
        if lookup not in pending:
            scorer.take(lookup, None, done)
    if not pending:
        return
    jobs = [scorer.job(lookup) for lookup in pending]
    jobs = [job if _needs_home(job) else replace(job, home=None) for job in jobs]
    sizes = _check_folders(jobs, where.cluster)
    tell = scorer.callbacks.tell
    asked = dict.fromkeys(name for job in jobs for name in job.names)
    tell(f"scoring {_models(len(jobs))} on the cluster, on {', '.join(asked)}")
    running = where.cluster.run(
        *(score_on_node, _pieces(jobs)),
        name="diffxfer eval",
        threads=1 if where.gpus else where.cluster.threads(None),
        gpus=where.gpus,
        memory=PROCESS_BYTES + (0 if where.gpus else max(sizes)),
        progress=_request_callback(scorer.callbacks.answered, len(jobs)),
    )
    with closing(running):
        for number, (index, answers) in enumerate(running, 1):
            scorer.take(pending[index], _arrived(answers), done)
            tell(f"scored {jobs[index].model} ({number} of {len(jobs)})")


def _needs_home(job: ScoringJob) -> bool:
    """Whether a node writes a graft, which may be large, for its backend to read."""
    return job.diff is not None and not job.settings.grafts_in_memory


def _check_folders(jobs: Sequence[ScoringJob], cluster: Cluster) -> list[int]:
    """Check that every node sees the models; returns the sizes of their weights in bytes."""
    folders = {folder for job in jobs for folder in (job.folder, job.diff) if folder is not None}
    shards = {folder: shards_of(folder.absolute()) for folder in sorted(folders)}
    inputs = [shard for found in shards.values() for shard in found]
    homes = {job.home for job in jobs if job.home is not None}
    if not homes:
        cluster.check_folders(None, inputs)
    for home in homes:
        with scratch_folder(home.absolute()) as scratch:
            cluster.check_folders(scratch, inputs)
    return [sum(shard.size for shard in shards[job.folder]) for job in jobs]


def _pieces(jobs: Sequence[ScoringJob]) -> list[_Piece]:
    return [_Piece(job, Path.cwd(), _versions()) for job in jobs]


def score_on_node(piece: _Piece, report: Callable[[int], None]) -> Answers:
    """Score a model on a node of a cluster.

    Args:
        piece: the model, and how it is scored.
        report: called with the numbers of requests that are built and answered, as one number.

    Raises:
        DiffxferError: if the model cannot be scored there.
    """
    from diffxfer.evaluation.harness import check_device
    from diffxfer.evaluation.lm_eval_tasks import find_tasks

    problem = other_version(piece.versions, _versions())
    if problem:
        raise ClusterError(f"node {os.uname().nodename}", problem, SAME)

    def told(answered: int, built: int) -> None:
        report(_packed(answered, built))

    with _inside(piece.folder), traceback_logged():
        check_device(piece.job.settings)
        tasks = find_tasks(piece.job.settings, fingerprint=False)
        answers = score_model(piece.job, tasks, told=told)
    if answers.tracker is not None:
        # The clocks of two machines have nothing in common: what it took is sent.
        answers.tracker.general_config_tracker.start_time -= time.perf_counter()
    return answers


def _versions() -> dict[str, str]:
    return {package: version_of(package) or "none" for package in VERSIONED_PACKAGES}


def _arrived(answers: Answers) -> Answers:
    if answers.tracker is not None:
        answers.tracker.general_config_tracker.start_time += time.perf_counter()
    return answers


@contextmanager
def traceback_logged() -> Iterator[None]:
    """Print the traceback of a known failure to the node's log: only its message is sent back."""
    try:
        yield
    except DiffxferError:
        traceback.print_exc()
        raise


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make a folder the current one: paths of users, also in their task files, begin there."""
    before = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as exc:
        problem = f"does not see the current folder {folder} ({exc.strerror})"
        remedy = "run the command in a folder that every node mounts at the same path"
        raise ClusterError(f"node {os.uname().nodename}", problem, remedy) from exc
    try:
        yield
    finally:
        os.chdir(before)


def _packed(answered: int, built: int) -> int:
    """One number, so that the sum over all models has the sums of both, and the models begun."""
    begun = int(built > 0)
    return (begun << 2 * _BITS) + (built << _BITS) + answered


def _request_callback(
    answered: Callable[[str, int, int], None] | None, models: int
) -> Callable[[int], None] | None:
    """One bar over all models; those that have not begun are taken to ask as much as the others."""
    if answered is None:
        return None

    def show(packed: int) -> None:
        begun, built = packed >> 2 * _BITS, packed >> _BITS & (1 << _BITS) - 1
        total = built * models // max(begun, 1)
        answered(_models(models), packed & (1 << _BITS) - 1, total)

    return show


def _models(count: int) -> str:
    return f"{count} model{'' if count == 1 else 's'}"
