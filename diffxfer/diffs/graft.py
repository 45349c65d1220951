"""Grafting: target + α·Δ, with Δ from a diff vector (`apply_diff`) or on the fly (`transfer`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.place import refuse_unsafe_output
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.source import find
from diffxfer.diffs.artifact.manifest import refuse_diff, require_diff
from diffxfer.diffs.companions.inherit import inherit_companions
from diffxfer.diffs.extract import every_input, warn_of_one_model
from diffxfer.diffs.extract_tasks import compare
from diffxfer.diffs.graft_match import (
    count_tied_head,
    match_roles,
    names_to_choose,
    target_side,
)
from diffxfer.diffs.graft_options import check_options
from diffxfer.diffs.graft_tasks import graft_tasks, with_tied_head
from diffxfer.diffs.job import Job, do
from diffxfer.diffs.kinship import finish_of, kinship_of_graft
from diffxfer.diffs.matching.names import pair_names
from diffxfer.diffs.matching.ties import find_head
from diffxfer.diffs.soundness.check import check_diff, check_result, check_roles
from diffxfer.diffs.source import Source, from_checkpoints, from_diff, open_roles, source_entry
from diffxfer.diffs.vocab.relate import relate_to_target
from diffxfer.diffs.vocab.tokens import read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.companions.inherit import Inheritance
    from diffxfer.diffs.graft_options import GraftOptions
    from diffxfer.diffs.report import Report
    from diffxfer.diffs.vocab.pair_target import TargetPairing
    from diffxfer.streaming.plan import TensorTask


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
    allow_unrelated: bool = False,
    max_shard_size: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    device_memory: str = "512MB",
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
        allow_unrelated: graft even where base and target have nothing to do with each other.
        max_shard_size: such as ``"5GB"``; None cuts shards as the target's are.
        threads: how many workers; None for one a processor.
        device: where the arithmetic runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` to
            decide.
        device_memory: the most that is allocated on a GPU.
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
    options = check_options(
        *(alpha, alpha_for, include, exclude, allow_missing, vocab, out_dtype, max_shard_size),
        *(threads, device, device_memory, allow_nonfinite, allow_unrelated),
        *(overwrite, restart, stream, dry_run, progress),
    )
    out = Path(out)
    places = find(diff, "a diff vector"), find(target, "the target checkpoint")
    refuse_diff(places[1].folder, "target")
    manifest = require_diff(places[0].folder)
    opened = open_checkpoint(places[1], "target")
    source = from_diff(places[0], manifest)
    check_diff(source.behaviour, {d.name: d.sources[0] for d in source.match.differences})
    inputs = every_input(places[0].folder, opened), [shard.path for shard in source.shards]
    refuse_unsafe_output(out, [*inputs[0], *inputs[1]], overwrite=overwrite)
    return _graft(source, (opened,), out, options, (places[0].folder, manifest))


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
    allow_unrelated: bool = False,
    max_shard_size: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    device_memory: str = "512MB",
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
        allow_unrelated: graft even where base and target have nothing to do with each other.
        max_shard_size: such as ``"5GB"``; None cuts shards as the target's are.
        threads: how many workers; None for one a processor.
        device: where the arithmetic runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` to
            decide.
        device_memory: the most that is allocated on a GPU.
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
    options = check_options(
        *(alpha, alpha_for, include, exclude, allow_missing, vocab, out_dtype, max_shard_size),
        *(threads, device, device_memory, allow_nonfinite, allow_unrelated),
        *(overwrite, restart, stream, dry_run, progress),
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
    return _graft(source, tuple(opened.values()), out, options, None, warnings)


def _labels(opened: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The target's name of every tensor of finetuned and base that has one."""
    labels: dict[str, str] = {}
    target = opened["target"].tensors.keys()
    for role in ("base", "finetuned"):
        pairs = pair_names(target, opened[role].tensors.keys(), ("the target", role))
        labels |= {theirs: ours for ours, theirs in pairs.items()}
    return labels


def _graft(
    source: Source,
    roles: Sequence[Checkpoint],
    out: Path,
    options: GraftOptions,
    diff: tuple[Path, Manifest] | None,
    warnings: Sequence[str] = (),
) -> Report:
    """What `apply_diff` and `transfer` have in common; the last of the roles is the target."""
    target = roles[-1]
    selection = options.selection
    selection.refuse_unused(names_to_choose(source, target))
    head = find_head(target.tensors, target.config)
    match = match_roles(source, side := target_side(target, head), head, selection)
    warnings = [*warnings, *count_tied_head(match, head, selection)]
    pairing, more = relate_to_target(
        source.vocabulary,
        read_tokenizer(target.folder),
        options.vocab,
        same_rows=all(ours.shape == theirs.shape for ours, theirs in match.grafts),
    )
    problems = [*source.match.problems, *match.problems]
    tasks: list[TensorTask] = []
    vocab_size: int | None = None
    if not problems:
        warnings += check_roles(*roles, graft=True)
        tasks, vocab_size = graft_tasks(source, match, pairing, selection, options.dtype, side)
    scaled = () if problems else match.scaled(selection)
    kinship = kinship_of_graft(scaled, diff, allow_unrelated=options.allow_unrelated)
    companions = _companions(source, target, pairing, vocab_size, options)
    compared = [compare(*pair) for pair in source.match.integers]
    tasks = [*compared, *kinship.tasks, *with_tied_head(tasks, target, head)]
    said = [*warnings, *kinship.warnings, *source.vocabulary.warnings, *more, *companions.warnings]
    said += check_result(companions.files, tasks)
    job = Job(
        verb=source.operation.value,
        out=out,
        tasks=tasks,
        inputs=(*source.shards, *target.weights.shards),
        indexed=target.weights.indexed and options.run.max_shard_bytes is None,
        files=dict(companions.files),
        command=options.command,
        sources={**source.entries, "target": source_entry(target.weights)},
        fates=[*match.fates, *source.match.fates],
        problems=problems,
        finish=finish_of(kinship, said),
        vocabulary=pairing.mode if pairing else "rows",
        added_tokens=tuple(pairing.names.values()) if pairing else (),
        dropped_tokens=pairing.dropped if pairing else (),
        left_out=companions.left_out,
        warnings=said,
        began=options.began,
        relations=kinship.relations,
    )
    return do(job, options.run)


def _companions(
    source: Source,
    target: Checkpoint,
    pairing: TargetPairing | None,
    vocab_size: int | None,
    options: GraftOptions,
) -> Inheritance:
    return inherit_companions(
        target.folder,
        source.behaviour,
        translate=pairing.translate if pairing else None,
        additions=pairing.names if pairing else {},
        added_source=pairing.additions if pairing else {},
        renamed=pairing.renamed if pairing else {},
        vocab_size=vocab_size,
        dtype=options.out_dtype,
    )
