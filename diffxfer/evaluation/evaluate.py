"""Scoring and comparing models and grafts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.adapter import read_adapter
from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.kind import require_diff
from diffxfer.evaluation.eval_page import REPORT, write_page
from diffxfer.evaluation.eval_settings import EvalSettings, make_settings
from diffxfer.evaluation.model_heads import brought_head, check_labels, supply_heads
from diffxfer.evaluation.model_roles import (
    ModelRoles,
    ModelUnderTest,
    assign_roles,
    supply_chat_templates,
)
from diffxfer.evaluation.score_on_cluster import choose_cluster, score_on_cluster
from diffxfer.evaluation.score_rows import (
    ScoredModel,
    best_alpha,
    compare_models,
    requested_columns,
)
from diffxfer.evaluation.scorer import Callbacks, Scorer, check_grafts
from diffxfer.evaluation.scores import Evaluation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.streaming.distribute import Cluster


def evaluate(
    models: Sequence[Path | str] | Path | str,
    *,
    tasks: Sequence[str] | str,
    baseline: Path | str | None = None,
    finetuned: Path | str | None = None,
    diff: Path | str | None = None,
    alpha: Sequence[float] | float | None = None,
    include_path: Path | str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    gen_kwargs: str | Mapping[str, Any] | None = None,
    backend: str = "hf",
    model_args: str | Mapping[str, Any] | None = None,
    seed: str | int | Sequence[int | None] | None = None,
    trust_remote_code: bool = False,
    output: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
    answered: Callable[[str, int, int], None] | None = None,
    opened: Callable[[Path], None] | None = None,
    salvage: Callable[[Evaluation], None] | None = None,
    cluster: Cluster | None = None,
    gpus_per_model: float | None = None,
) -> Evaluation:
    """Score models with lm-eval, and compare them on the same samples.

    Args:
        models: folders, or models on the Hub, ``"org/name"`` or ``"org/name@revision"``; the first
            one is the target, which the others should improve on.
        tasks: names of lm-eval tasks, groups or tags, patterns, or YAML files; a list, or one
            string with commas.
        baseline: the model to compare with; the first one by default.
        finetuned: the directly fine-tuned target, whose gain a graft should recover.
        diff: a diff vector, or a LoRA adapter, to graft on the first model.
        alpha: the scales of the diff vector; each gives a graft to score; 1 by default.
        include_path: a folder of custom tasks.
        num_fewshot: examples before each question; None for the default of the task.
        limit: questions per task, or the share of them if below 1.
        batch_size: questions per batch, ``"auto"``, or ``"auto:N"``.
        device: such as ``"cuda:0"``; None for a GPU if there is one.
        dtype: the dtype of the loaded model; ``"auto"`` for that of the checkpoint.
        apply_chat_template: format questions with the chat template of the model.
        fewshot_as_multiturn: format examples as turns of a conversation; None for yes with a chat
            template.
        system_instruction: the system prompt.
        gen_kwargs: generation options: a mapping, or ``"key=value,key=value"``.
        backend: the backend of lm-eval: ``"hf"``, ``"vllm"``, or another one; ``"classifier"`` for
            sequence classifiers.
        model_args: options for the backend: a mapping, or ``"key=value,key=value"``.
        seed: one number, or four: for Python, numpy, torch and the choice of examples.
        trust_remote_code: execute code in the checkpoint.
        output: a folder for lm-eval's files, `comparison.json` and `report.html`; scores in it are
            reused.
        progress: called with a line about the next work.
        moved: called with the bytes done and the total of a download or a graft.
        answered: called with the model being scored, the number of answered requests and the
            total, which is 0 before the requests are built.
        opened: called with the output folder when it can be written to.
        salvage: called with the finished scores if a failure ends the evaluation early.
        cluster: where the models are scored, each on one node, such as `RayCluster`; None for this
            process.
        gpus_per_model: GPUs of each model on the cluster, also a share; by default 1 if a node has
            GPUs and `device` is not another, else 0.

    Returns:
        The comparison, with a row for each model, task and metric.

    Raises:
        DiffxferError: for every known failure; finished scores are kept in `output`.

    Example:
        >>> evaluate(["llama-3.1", "grafted"], tasks=["gsm8k"])  # doctest: +SKIP
    """
    began = time.perf_counter()
    settings = make_settings(
        tasks=tasks,
        include_path=None if include_path is None else Path(include_path),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        system_instruction=system_instruction,
        gen_kwargs=gen_kwargs,
        backend=backend,
        model_args=model_args,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    where, settings = choose_cluster(cluster, gpus_per_model, settings)
    named = [models] if isinstance(models, str | Path) else list(models)
    alphas = [alpha] if isinstance(alpha, int | float) else alpha
    roles = assign_roles(named, baseline, finetuned, diff, alphas, settings)
    callbacks = Callbacks(progress or (lambda _: None), moved, answered, opened)
    scorer, warnings = _prepare(roles, settings, output, callbacks, here=where is None)
    done: dict[ModelUnderTest, ScoredModel] = {}

    def so_far() -> Evaluation:
        ordered = [done[model] for model in scorer.roles.models if model in done]
        return _compare(scorer, ordered, warnings, time.perf_counter() - began)

    try:
        if where is not None:
            score_on_cluster(scorer, where, done)
        for model in scorer.roles.models if where is None else ():
            scorer.score(model, done)
        evaluation = so_far()
        if scorer.store is not None:
            scorer.store.write_comparison(evaluation.as_json())
            write_page(evaluation, scorer.store.folder / REPORT)
    except BaseException:
        if salvage is not None and done:
            salvage(so_far())
        raise
    return evaluation


def _prepare(
    roles: ModelRoles,
    settings: EvalSettings,
    output: Path | str | None,
    callbacks: Callbacks,
    *,
    here: bool,
) -> tuple[Scorer, list[str]]:
    """Check everything that can be checked before the first model is scored.

    Without `here`, the device is that of a node.
    """
    from diffxfer.evaluation.harness import check_backend, check_device, parse_device
    from diffxfer.evaluation.lm_eval_tasks import check_task_files, find_tasks
    from diffxfer.evaluation.score_store import ScoreStore

    tell = callbacks.tell
    check_task_files(settings)
    check_backend(settings)
    shards: list[ShardFile] = []
    if settings.reads_folders:
        roles, shards = _find(roles, tell)
        roles = supply_chat_templates(roles, settings, tell)
        roles = supply_heads(roles, settings, tell)
    folders = [] if roles.diff is None else [roles.folder(roles.diff)]
    folders += map(roles.folder, roles.labels()) if settings.reads_folders else []
    if here:
        check_device(settings)
    elif settings.device is not None and settings.in_process:
        parse_device(settings.device)
    store = None if output is None else ScoreStore(Path(output), folders)
    if store is not None and callbacks.opened is not None:
        callbacks.opened(store.folder)
    home = None if store is None else store.folder
    warnings = list(check_grafts(roles, home, settings))
    for warning in warnings:
        tell(f"warning: {warning}")
    fetch_shards(shards, callbacks.moved)
    tell(f"loading {', '.join(settings.tasks)}")
    tasks = find_tasks(settings, fingerprint=store is not None)
    check_labels(roles, settings, tasks)
    return Scorer(roles, settings, tasks, store, callbacks), warnings


def _find(roles: ModelRoles, tell: Callable[[str], None]) -> tuple[ModelRoles, list[ShardFile]]:
    """Find all models and the diff vector, in folders or on the Hub, and list their shards."""
    from diffxfer.evaluation.harness import check_model

    places = {label: find(label, "a model") for label in roles.labels()}
    shards = [shard for place in places.values() for shard in check_model(place).shards]
    if roles.diff is not None:
        place = places[str(roles.diff)] = find(roles.diff, "a diff vector")
        if is_adapter(place):
            shards.append(read_adapter(place).shard)
        else:
            require_diff(place.folder)
            shards += open_weights(place).shards
    for name in (name for name, place in places.items() if place.files is not None):
        tell(f"{name} is not a folder, so it is taken from the Hub")
    return replace(roles, found={name: place.folder for name, place in places.items()}), shards


def _compare(
    scorer: Scorer, done: Sequence[ScoredModel], warnings: Sequence[str], elapsed_s: float
) -> Evaluation:
    """Compare the models that are scored so far."""
    roles, store = scorer.roles, scorer.store
    columns = requested_columns(scorer.tasks, done)
    brings = scorer.settings.is_classifier and brought_head(roles) is not None
    rows = compare_models(
        done,
        target=roles.target,
        baseline=roles.baseline,
        finetuned=roles.finetuned,
        columns=columns,
    )
    reused = [
        ModelUnderTest(model.label, roles.diff, model.alpha) for model in done if model.reused
    ]
    told = [warning for model in done for warning in model.warnings]
    return Evaluation(
        rows=rows,
        target=roles.target,
        baseline=roles.baseline,
        finetuned=roles.finetuned,
        columns=columns,
        best=best_alpha(rows, columns, str(roles.diff), roles.target, brings=brings),
        reused=tuple(map(str, reused)),
        warnings=(*warnings, *told, *([] if store is None else store.warnings)),
        output=None if store is None else store.folder,
        elapsed_s=elapsed_s,
    )
