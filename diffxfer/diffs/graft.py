"""Grafting: target + α·Δ, with Δ from a diff vector (`apply_diff`) or on the fly (`transfer`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.place import refuse_unsafe_output
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.source import find
from diffxfer.diffs.artifact.manifest import refuse_diff, require_diff
from diffxfer.diffs.companions.inherit import inherit_companions
from diffxfer.diffs.extract import DTYPES, compare, every_input, warn_of_one_model
from diffxfer.diffs.graft_match import (
    count_tied_head,
    match_roles,
    names_to_choose,
    target_side,
)
from diffxfer.diffs.graft_tasks import graft_tasks
from diffxfer.diffs.job import Job, RunOptions, do, nothing_more
from diffxfer.diffs.matching.names import pair_names
from diffxfer.diffs.matching.selection import Selection, make_selection
from diffxfer.diffs.matching.ties import Head, HeadState, find_head
from diffxfer.diffs.shards import parse_size
from diffxfer.diffs.source import Source, from_checkpoints, from_diff, open_roles, source_entry
from diffxfer.diffs.vocab.pair_base import check_mode
from diffxfer.diffs.vocab.relate import relate_to_target
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import OptionError
from diffxfer.streaming.run import check_run_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.report import Report
    from diffxfer.streaming.plan import TensorTask


@dataclass(frozen=True, slots=True)
class _Options:
    """The options that `apply_diff` and `transfer` share, checked."""

    selection: Selection
    vocab: str
    out_dtype: str | None
    command: dict[str, str | float | list[str] | dict[str, float]]
    run: RunOptions
    began: float


def apply_diff(
    diff: Path | str,
    target: Path | str,
    out: Path | str,
    *,
    alpha: float = 1.0,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    vocab: str = "auto",
    out_dtype: str | None = None,
    allow_nonfinite: bool = False,
    max_shard_size: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    restart: bool = False,
    stream: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Graft a diff vector on a target: target + α·Δ.

    Args:
        diff: a diff vector that `extract_diff` made: a folder, or one on the Hub, ``"org/name"``
            or ``"org/name@revision"``.
        target: the checkpoint to graft on, likewise.
        out: the folder to make.
        alpha: the scale of Δ; 0 copies the target.
        alpha_for: patterns of the target's names with a scale of their own; the last match wins.
        include: graft only tensors whose names one of these patterns matches; copy the others.
        exclude: copy tensors whose names one of these patterns matches.
        allow_missing: tensors that a role may lack: the target's are copied, others dropped.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        out_dtype: such as ``"bfloat16"``; None keeps the target's, tensor by tensor.
        allow_nonfinite: let NaN, infinity and overflow through.
        max_shard_size: such as ``"5GB"``; None cuts shards as the target's are.
        threads: how many workers; None for one a processor.
        device: where the arithmetic runs, as torch names it.
        overwrite: replace a folder of ours at `out`.
        restart: discard what unfinished runs to `out` left, instead of going on from there.
        stream: read models on the Hub there, instead of downloading them into its cache.
        dry_run: plan and check, and write nothing.
        progress: called with the bytes done and the bytes in all.

    Returns:
        What was done.

    Raises:
        DiffxferError: for every known failure; nothing is at `out` then, and the same call goes on
            from what was done.

    Example:
        >>> apply_diff("sft-diff", "llama-3.1", "llama-3.1-grafted")  # doctest: +SKIP
    """
    options = _check(
        *(alpha, alpha_for, include, exclude, allow_missing, vocab, out_dtype, max_shard_size),
        *(threads, device, allow_nonfinite, overwrite, restart, stream, dry_run, progress),
    )
    out = Path(out)
    places = find(diff, "a diff vector"), find(target, "the target checkpoint")
    refuse_diff(places[1].folder, "target")
    require_diff(places[0].folder)
    opened = open_checkpoint(places[1], "target")
    source = from_diff(places[0])
    inputs = every_input(places[0].folder, opened), [shard.path for shard in source.shards]
    refuse_unsafe_output(out, [*inputs[0], *inputs[1]], overwrite=overwrite)
    return _graft("apply", source, opened, out, options)


def transfer(
    finetuned: Path | str,
    base: Path | str,
    target: Path | str,
    out: Path | str,
    *,
    alpha: float = 1.0,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    vocab: str = "auto",
    out_dtype: str | None = None,
    allow_nonfinite: bool = False,
    max_shard_size: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    restart: bool = False,
    stream: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Extract and graft in one pass: target + α·(finetuned − base), with no diff vector written.

    Args:
        finetuned: the fine-tuned checkpoint: a folder, or a model on the Hub, ``"org/name"`` or
            ``"org/name@revision"``.
        base: the checkpoint that it was made from, likewise.
        target: the checkpoint to graft on, likewise.
        out: the folder to make.
        alpha: the scale of Δ; 0 copies the target.
        alpha_for: patterns of the target's names with a scale of their own; the last match wins.
        include: graft only tensors whose names one of these patterns matches; copy the others.
        exclude: copy tensors whose names one of these patterns matches.
        allow_missing: tensors that a role may lack: the target's are copied, others dropped.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        out_dtype: such as ``"bfloat16"``; None keeps the target's, tensor by tensor.
        allow_nonfinite: let NaN, infinity and overflow through.
        max_shard_size: such as ``"5GB"``; None cuts shards as the target's are.
        threads: how many workers; None for one a processor.
        device: where the arithmetic runs, as torch names it.
        overwrite: replace a folder of ours at `out`.
        restart: discard what unfinished runs to `out` left, instead of going on from there.
        stream: read models on the Hub there, instead of downloading them into its cache.
        dry_run: plan and check, and write nothing.
        progress: called with the bytes done and the bytes in all.

    Returns:
        What was done.

    Raises:
        DiffxferError: for every known failure; nothing is at `out` then, and the same call goes on
            from what was done.

    Example:
        >>> transfer("llama-3.0-sft", "llama-3.0", "llama-3.1", "grafted")  # doctest: +SKIP
    """
    options = _check(
        *(alpha, alpha_for, include, exclude, allow_missing, vocab, out_dtype, max_shard_size),
        *(threads, device, allow_nonfinite, overwrite, restart, stream, dry_run, progress),
    )
    out = Path(out)
    opened = open_roles({"finetuned": finetuned, "base": base, "target": target})
    refuse_unsafe_output(out, every_input(*opened.values()), overwrite=overwrite)
    warnings = warn_of_one_model(opened["finetuned"], opened["base"], opened["target"])
    labels = _labels(opened)
    source = from_checkpoints(
        opened["finetuned"],
        opened["base"],
        options.selection,
        lambda name: labels.get(name, name),
        vocab,
    )
    return _graft("transfer", source, opened["target"], out, options, warnings)


def _labels(opened: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The target's name of every tensor of finetuned and base that has one."""
    labels: dict[str, str] = {}
    target = opened["target"].tensors.keys()
    for role in ("base", "finetuned"):
        pairs = pair_names(target, opened[role].tensors.keys(), ("the target", role))
        labels |= {theirs: ours for ours, theirs in pairs.items()}
    return labels


def _check(
    alpha: float,
    alpha_for: Mapping[str, float] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_missing: Sequence[str],
    vocab: str,
    out_dtype: str | None,
    max_shard_size: str | None,
    threads: int | None,
    device: str,
    allow_nonfinite: bool,
    overwrite: bool,
    restart: bool,
    stream: bool,
    dry_run: bool,
    progress: Callable[[int, int], None] | None,
) -> _Options:
    began = time.perf_counter()
    if out_dtype is not None and out_dtype not in DTYPES:
        problem = f"{out_dtype!r} is unknown"
        raise OptionError("--out-dtype", problem, f"use one of {', '.join(DTYPES)}")
    check_mode(vocab)
    selection = make_selection(
        alpha=alpha,
        alpha_for=alpha_for,
        include=include,
        exclude=exclude,
        allow_missing=allow_missing,
    )
    command: dict[str, str | float | list[str] | dict[str, float]] = {
        "alpha": float(alpha),
        "alpha_for": {regex: float(scale) for regex, scale in (alpha_for or {}).items()},
        **selection.command(),
        "vocab": vocab,
        "out_dtype": out_dtype or "target",
        "max_shard_size": max_shard_size or "target",
        "allow_nonfinite": str(allow_nonfinite).lower(),
    }
    max_shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    check_run_options(threads, device)
    run = RunOptions(
        *(threads, device, allow_nonfinite, max_shard_bytes, overwrite, restart, dry_run, progress),
        stream=stream,
    )
    return _Options(selection, vocab, out_dtype, command, run, began)


def _graft(
    verb: str,
    source: Source,
    target: Checkpoint,
    out: Path,
    options: _Options,
    warnings: Sequence[str] = (),
) -> Report:
    """What `apply_diff` and `transfer` have in common."""
    selection = options.selection
    selection.refuse_unused(names_to_choose(source, target))
    head = find_head(target.tensors, target.config)
    side = target_side(target, head)
    match = match_roles(source, side, head, selection)
    warnings = [*warnings, *count_tied_head(match, head, selection)]
    pairing, more = relate_to_target(
        source.vocabulary,
        read_tokenizer(target.folder),
        options.vocab,
        same_rows=all(ours.shape == theirs.shape for ours, theirs in match.grafts),
    )
    tasks: list[TensorTask] = []
    vocab_size: int | None = None
    if not (match.problems or source.match.problems):
        dtype = DTYPES[options.out_dtype] if options.out_dtype else None
        tasks, vocab_size = graft_tasks(source, match, pairing, selection, dtype, side.vocabulary)
        tasks += _tied_copy(tasks, target, head)
        order = {name: number for number, name in enumerate(target.tensors)}
        tasks.sort(key=lambda task: order[task.name])
    companions = inherit_companions(
        target.folder,
        source.behaviour,
        translate=pairing.translate if pairing else None,
        additions=pairing.names if pairing else {},
        added_source=pairing.additions if pairing else {},
        renamed=pairing.renamed if pairing else {},
        vocab_size=vocab_size,
        dtype=options.out_dtype,
    )
    job = Job(
        verb=verb,
        out=out,
        tasks=[*(compare(*pair) for pair in source.match.integers), *tasks],
        inputs=(*source.shards, *target.weights.shards),
        indexed=target.weights.indexed and options.run.max_shard_bytes is None,
        files=dict(companions.files),
        command=options.command,
        sources={**source.entries, "target": source_entry(target.weights)},
        fates=[*match.fates, *source.match.fates],
        problems=[*source.match.problems, *match.problems],
        finish=nothing_more,
        vocabulary=pairing.mode if pairing else "rows",
        added_tokens=tuple(pairing.names.values()) if pairing else (),
        dropped_tokens=pairing.dropped if pairing else (),
        left_out=companions.left_out,
        warnings=[*warnings, *source.vocabulary.warnings, *more, *companions.warnings],
        began=options.began,
    )
    return do(job, options.run)


def _tied_copy(tasks: Sequence[TensorTask], target: Checkpoint, head: Head) -> list[TensorTask]:
    """A head that the target keeps as a copy of its embedding stays one."""
    if head.state is not HeadState.TIED or head.name is None:
        return []
    embedding = next(task for task in tasks if task.name == head.embedding)
    shard = target.tensors[head.name].shard.path.name
    return [replace(embedding, name=head.name, shard=shard)]
