"""Will a graft work, and why: every measurement of three or four models in one report."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from diffxfer.errors import EvaluationError
from diffxfer.probing.distances import measure_distances
from diffxfer.probing.pair_options import pair_options
from diffxfer.probing.probe_options import check_probe_options
from diffxfer.probing.report import ProbeReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.diffs.grafting.options import WeightOptions
    from diffxfer.probing.distances import Distances
    from diffxfer.probing.forecast import Forecast
    from diffxfer.probing.probe_options import ProbeOptions


def probe(
    finetuned: Path | str,
    base: Path | str,
    target: Path | str,
    *,
    direct: Path | str | None = None,
    data: Path | str | None = None,
    tasks: Sequence[str] | str | None = None,
    include_path: Path | str | None = None,
    limit: float | None = None,
    alpha: Sequence[float] | float = 1.0,
    points: int = 11,
    forward: bool = False,
    rows: int = 200,
    batch_size: int = 16,
    device: str | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    added: str = "refuse",
    rename: Sequence[str] = (),
    vocab: str = "auto",
    threads: int | None = None,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stage: Callable[[str], None] | None = None,
) -> ProbeReport:
    """Measure what tells whether target + α·(finetuned − base) will work; writes no model.

    Distances and a forecast need no model in memory. With rows or tasks, models are loaded, at most
    two at once, and measured on them.

    Args:
        finetuned: the fine-tuned model, or a LoRA adapter: a folder, or ``"org/name[@revision]"``.
        base: the model that finetuned was trained from, named the same way.
        target: the successor of base, named the same way.
        direct: the target's own fine-tune, or an adapter of the target; None if there is none.
        data: rows as `tune` takes them, or with labels for a classifier: a file, or a dataset on
            the Hub; models are measured on them.
        tasks: names of lm-eval tasks, a list or one string with commas; models are scored on them.
        include_path: a folder of custom tasks.
        limit: questions per task, or the share of them if below 1.
        alpha: the scale of Δ, or several to compare; paths use the best of them.
        points: points of a path, its ends included.
        forward: base reads the data, or a text that ships, for a better forecast.
        rows: the most rows of the data, drawn by the seed.
        batch_size: the most rows that go through a model together.
        device: such as ``"cuda:0"``; None for a GPU if there is one.
        seed: of the choice of rows, of permuted copies and of intervals.
        output: a folder for ``probe.html`` and ``probe.json``; None to write none.
        include: only tensors whose target name matches one of these patterns take part.
        exclude: tensors whose target name matches one of these patterns take no part.
        allow_missing: tensors that a model may lack.
        added: what to do with a head that fine-tuning added: ``"bring"``, ``"drop"``, or
            ``"refuse"``.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a model's tensors are paired; the roles
            are finetuned, base, target and direct.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        threads: number of workers; None for one per processor.
        stream: read models from the Hub without downloading them into its cache.
        progress: called with the bytes done and the total bytes.
        stage: called with a line about the next work.

    Returns:
        What was measured.

    Raises:
        DiffxferError: if a model is not a sound checkpoint or changes while it is read, if the
            models do not pair, or if they do not fit in memory.

    Example:
        >>> probe("llama-3.0-sft", "llama-3.0", "llama-3.1").forecast.low  # doctest: +SKIP
    """
    began = time.perf_counter()
    given = {"finetuned": finetuned, "base": base, "target": target, "direct": direct}
    named = {role: str(model) for role, model in given.items() if model is not None}
    options = check_probe_options(
        data=data,
        tasks=tasks,
        include_path=include_path,
        limit=limit,
        alpha=alpha,
        points=points,
        forward=forward,
        rows=rows,
        batch_size=batch_size,
        device=device,
        seed=seed,
        output=output,
    )
    weights: WeightOptions = {
        "include": include,
        "exclude": exclude,
        "allow_missing": allow_missing,
        "added": added,
        "rename": [text for text in rename if not text.startswith("direct:")],
        "vocab": vocab,
        "allow_unrelated": True,
    }
    tell = stage or (lambda _: None)
    tell("reading weights")
    distances = measure_distances(
        *(finetuned, base, target, direct),
        options=pair_options(
            include=include,
            exclude=exclude,
            allow_missing=allow_missing,
            added=added,
            rename=rename,
            vocab=vocab,
            direct=direct is not None,
        ),
        threads=threads,
        stream=stream,
        progress=progress,
    )
    parts: dict[str, Any] = {}
    if options.loads_models:
        parts = _measure_models(named, options, weights, progress, tell)
    activations = parts.get("activations")
    report = ProbeReport(
        models=named,
        distances=distances,
        forecast=_forecast(distances, None if activations is None else activations.mean),
        **parts,
        warnings=distances.warnings,
        elapsed_s=round(time.perf_counter() - began, 3),
        output=options.output,
    )
    if options.output is not None:
        from diffxfer.probing.probe_page import write_probe

        write_probe(report, options.output)
    return report


def _forecast(distances: Distances, activations: float | None) -> Forecast | None:
    """The forecast; None if there is nothing to graft."""
    from diffxfer.probing.forecast import forecast

    total = distances.total
    if not total.delta_norm:
        return None
    try:
        return forecast(total.shift_norm / total.delta_norm, activations)
    except EvaluationError:
        return None  # a norm is infinite: the warnings say where


def _measure_models(
    named: Mapping[str, str],
    options: ProbeOptions,
    weights: WeightOptions,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that needs models in memory."""
    from diffxfer.probing.measure_models import measure_models
    from diffxfer.probing.probe_models import ProbeModels

    with ExitStack() as stack:
        models = ProbeModels(named, stack, weights, progress)
        return measure_models(models, options, tell)
