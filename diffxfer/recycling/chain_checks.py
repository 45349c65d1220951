"""Checks of a chain before its first step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.grafting.graft import transfer
from diffxfer.diffs.matching.refusal import refusal
from diffxfer.errors import MatchError, RelatednessError
from diffxfer.evaluation.eval_settings import make_settings
from diffxfer.evaluation.score_on_cluster import choose_cluster, count_gpus
from diffxfer.recycling.chain_heads import added_head

if TYPE_CHECKING:
    from diffxfer.recycling.recipe import EvalSection, Recipe
    from diffxfer.streaming.distribute import Cluster


def gpus_for(cluster: Cluster, wanted: float | None, device: str | None) -> float:
    """The number of GPUs of a piece of work of a chain; none if the recipe names another device.

    Args:
        cluster: the cluster.
        wanted: the number that was asked for, for all pieces; None for 1 where there are GPUs.
        device: the device in the recipe.
    """
    on_gpu = device is None or device.startswith("cuda")
    return count_gpus(cluster, wanted if on_gpu else None, device)


def check_evaluation(recipe: Recipe, cluster: Cluster | None, gpus: float | None) -> None:
    """Check the eval part of a recipe before hours of training depend on it.

    Args:
        recipe: a recipe with an eval part.
        cluster: the cluster on which models are scored; None for this process.
        gpus: GPUs of each model there.

    Raises:
        DiffxferError: if an option is invalid, a task is unknown, or its data cannot be loaded.
    """
    from diffxfer.evaluation.harness import check_backend, check_device
    from diffxfer.evaluation.lm_eval_tasks import check_task_files, find_tasks

    assert recipe.eval is not None
    given = evaluation_options(recipe.eval, tasks=recipe.eval.tasks)
    folder = given.pop("include_path")
    settings = make_settings(include_path=None if folder is None else Path(folder), **given)
    check_task_files(settings)
    check_backend(settings)
    if cluster is None:
        check_device(settings)
    else:
        choose_cluster(cluster, gpus_for(cluster, gpus, settings.device), settings)
    find_tasks(settings, fingerprint=False)


def check_bases(recipe: Recipe, run: Path) -> None:
    """Check, by a dry run of each graft, that the bases are compatible with one another.

    A tuned model has the tensors and tokens of its base, so the base can represent it here.

    Args:
        recipe: the recipe.
        run: the folder of the run.

    Raises:
        DiffxferError: if tensors or tokens do not match, or two models are unrelated.
    """
    finetuned = recipe.finetuned
    for before, base in pairwise(recipe.bases):
        try:
            report = transfer(
                finetuned or before,
                before,
                base,
                run / "rounds",
                alpha=max(recipe.alphas, key=abs),
                added=added_head(recipe, Path(finetuned or before), Path(before)),
                dry_run=True,
            )
            if report.refused:
                raise refusal(report.refused)
        except (MatchError, RelatednessError) as exc:
            first = isinstance(exc, RelatednessError) and exc.roles == ("finetuned", "base")
            remedy = exc.remedy or ""
            exc.where = str(finetuned if first else base)
            exc.remedy = "check the bases and finetuned of the recipe"
            if "--added" in remedy:
                exc.remedy += ", or give added: bring in it to carry over what fine-tuning added"
            raise
        finetuned = None


def evaluation_options(scoring: EvalSection, *, tasks: list[str]) -> dict[str, Any]:
    """The options of scoring that a recipe gives, as `evaluate` takes them.

    Args:
        scoring: the eval part of the recipe.
        tasks: the tasks to score.
    """
    return {**scoring.model_dump(exclude={"tasks"}), "tasks": tasks}
