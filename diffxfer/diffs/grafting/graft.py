"""Grafting: target + α·Δ, with Δ from a diff vector (`apply_diff`) or on the fly (`transfer`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import refuse_unsafe_output
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.manifest import refuse_diff, require_diff
from diffxfer.diffs.companions.inherit import inherit_companions
from diffxfer.diffs.delta.from_artifact import from_diff
from diffxfer.diffs.delta.from_checkpoints import Source, from_checkpoints, read_roles, source_entry
from diffxfer.diffs.extraction.extract import every_input, warn_of_one_model
from diffxfer.diffs.extraction.extract_tasks import compare
from diffxfer.diffs.grafting.options import check_options
from diffxfer.diffs.grafting.pairing import (
    choose_added,
    count_tied_head,
    label_source,
    match_output,
    names_to_choose,
    other_fates,
)
from diffxfer.diffs.grafting.tasks import graft_tasks, whole_model
from diffxfer.diffs.jobs.job import Job, do, nothing_more
from diffxfer.diffs.matching.parts import pair_tensors
from diffxfer.diffs.matching.role import notes_of_names, read_role, shapes_of
from diffxfer.diffs.relations.kinship import kinship_of_graft, warning_of_digests
from diffxfer.diffs.soundness.check import check_diff, check_result, check_roles
from diffxfer.diffs.vocab.relate import relate_to_target
from diffxfer.diffs.vocab.tokens import read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.artifact.manifest import Manifest, TensorEntry
    from diffxfer.diffs.companions.inherit import Inheritance
    from diffxfer.diffs.grafting.options import GraftOptions
    from diffxfer.diffs.jobs.job import Finish
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.diffs.matching.role import Role
    from diffxfer.diffs.relations.kinship import Kinship
    from diffxfer.diffs.vocab.pair_target import TargetPairing
    from diffxfer.streaming.plan import TensorTask
    from diffxfer.streaming.statistics import TensorResult


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
    added: str = "refuse",
    rename: Sequence[str] = (),
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
    """Graft a diff vector onto a target: target + α·Δ.

    Args:
        diff: a diff vector that `extract_diff` made: a folder, or one on the Hub, ``"org/name"``
            or ``"org/name@revision"``.
        target: the checkpoint to graft onto, named the same way.
        out: the folder to create.
        alpha: the scale of Δ; 0 copies the target.
        alpha_for: scales by pattern of the target's tensor names; the last match wins.
        include: graft only tensors whose names match one of these patterns; copy the others.
        exclude: copy tensors whose names match one of these patterns.
        allow_missing: tensors that a role may lack: the target's are copied, others dropped.
        added: what to do with a head that fine-tuning added: ``"bring"`` it whole, ``"drop"`` it,
            or ``"refuse"``.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a role's tensors are paired.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        out_dtype: such as ``"bfloat16"``; None keeps the dtype of each of the target's tensors.
        allow_nonfinite: let NaN, infinity and overflow through.
        allow_unrelated: graft even if base and target are unrelated.
        max_shard_size: such as ``"5GB"``; None keeps the target's division into shards.
        threads: number of workers; None for one per processor.
        device: where the arithmetic runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` to
            choose.
        device_memory: the most memory to allocate on a GPU.
        overwrite: replace a folder that diffxfer wrote at `out`.
        restart: discard unfinished runs to `out` instead of resuming them.
        stream: read models from the Hub without downloading them into its cache.
        dry_run: plan and check only; write nothing.
        progress: called with the bytes done and the total bytes.

    Returns:
        What was done.

    Raises:
        DiffxferError: for every known failure; nothing is at `out` then, and the same call resumes
            the run.

    Example:
        >>> apply_diff("sft-diff", "llama-3.1", "llama-3.1-grafted")  # doctest: +SKIP
    """
    options = check_options(
        *(alpha, alpha_for, include, exclude, allow_missing, added, rename, vocab, out_dtype),
        *(max_shard_size, threads, device, device_memory, allow_nonfinite, allow_unrelated),
        *(overwrite, restart, stream, dry_run, progress, ("target",)),
    )
    out = Path(out)
    places = find(diff, "a diff vector"), find(target, "the target checkpoint")
    refuse_diff(places[1].folder, "target")
    manifest = require_diff(places[0].folder)
    opened = open_checkpoint(places[1], "target")
    role = read_role(opened, options.renames)
    source = from_diff(places[0], manifest)
    check_diff(source.behaviour, {d.name: d.sources[0] for d in source.match.differences})
    inputs = every_input(places[0].folder, opened), [shard.path for shard in source.shards]
    refuse_unsafe_output(out, [*inputs[0], *inputs[1]], overwrite=overwrite)
    labels = label_source(source, role.checkpoint)
    return _graft(source, (role,), out, options, labels, (places[0].folder, manifest))


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
    added: str = "refuse",
    rename: Sequence[str] = (),
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
    """Extract and graft in one pass: target + α·(finetuned − base); writes no diff vector.

    Args:
        finetuned: the fine-tuned checkpoint: a folder, or a model on the Hub, ``"org/name"`` or
            ``"org/name@revision"``.
        base: the checkpoint that finetuned was trained from, named the same way.
        target: the checkpoint to graft onto, named the same way.
        out: the folder to create.
        alpha: the scale of Δ; 0 copies the target.
        alpha_for: scales by pattern of the target's tensor names; the last match wins.
        include: graft only tensors whose names match one of these patterns; copy the others.
        exclude: copy tensors whose names match one of these patterns.
        allow_missing: tensors that a role may lack: the target's are copied, others dropped.
        added: what to do with a head that fine-tuning added: ``"bring"`` it whole, ``"drop"`` it,
            or ``"refuse"``.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a role's tensors are paired.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        out_dtype: such as ``"bfloat16"``; None keeps the dtype of each of the target's tensors.
        allow_nonfinite: let NaN, infinity and overflow through.
        allow_unrelated: graft even if base and target are unrelated.
        max_shard_size: such as ``"5GB"``; None keeps the target's division into shards.
        threads: number of workers; None for one per processor.
        device: where the arithmetic runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` to
            choose.
        device_memory: the most memory to allocate on a GPU.
        overwrite: replace a folder that diffxfer wrote at `out`.
        restart: discard unfinished runs to `out` instead of resuming them.
        stream: read models from the Hub without downloading them into its cache.
        dry_run: plan and check only; write nothing.
        progress: called with the bytes done and the total bytes.

    Returns:
        What was done.

    Raises:
        DiffxferError: for every known failure; nothing is at `out` then, and the same call resumes
            the run.

    Example:
        >>> transfer("llama-3.0-sft", "llama-3.0", "llama-3.1", "grafted")  # doctest: +SKIP
    """
    options = check_options(
        *(alpha, alpha_for, include, exclude, allow_missing, added, rename, vocab, out_dtype),
        *(max_shard_size, threads, device, device_memory, allow_nonfinite, allow_unrelated),
        *(overwrite, restart, stream, dry_run, progress, ("finetuned", "base", "target")),
    )
    out = Path(out)
    roles = read_roles({"finetuned": finetuned, "base": base, "target": target}, options.renames)
    opened = [role.checkpoint for role in roles.values()]
    refuse_unsafe_output(out, every_input(*opened), overwrite=overwrite)
    labels = _labels(roles)
    source = from_checkpoints(
        roles["finetuned"],
        roles["base"],
        options.selection,
        lambda name: labels.get(name, name),
        vocab,
        added,
    )
    warnings = warn_of_one_model(*opened)
    return _graft(source, tuple(roles.values()), out, options, labels, None, warnings)


def _labels(roles: Mapping[str, Role]) -> dict[str, str]:
    """The target's names of the tensors of finetuned and base, where it has them."""
    labels: dict[str, str] = {}
    target = shapes_of(roles["target"])
    for role in ("base", "finetuned"):
        pairs = pair_tensors(target, shapes_of(roles[role]), ("the target", role))
        labels |= {theirs: ours for ours, theirs in pairs.items()}
    return labels


def _graft(
    source: Source,
    roles: Sequence[Role],
    out: Path,
    options: GraftOptions,
    labels: Mapping[str, str],
    diff: tuple[Path, Manifest] | None,
    warnings: Sequence[str] = (),
) -> Report:
    """The common part of `apply_diff` and `transfer`; the last of the roles is the target."""
    role, selection = roles[-1], options.selection
    target = role.checkpoint
    selection.refuse_unused(names_to_choose(source, role, labels))
    if diff is not None:
        choose_added(source, options.added, selection, labels)
    output = match_output(source, role, selection, options.added)
    match = output.match
    warnings = [*warnings, *count_tied_head(match, output.head, selection)]
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
        warnings += check_roles(*(r.checkpoint for r in roles), graft=True)
        tasks, vocab_size = graft_tasks(source, output, pairing, selection, options.dtype)
    scaled = () if problems else match.scaled(selection)
    kinship = kinship_of_graft(scaled, diff, allow_unrelated=options.allow_unrelated)
    companions = _companions(source, target, pairing, vocab_size, options)
    compared = [compare(*pair) for pair in source.match.integers]
    tasks = [*compared, *kinship.tasks, *whole_model(tasks, output, options.dtype)]
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
        fates=[*match.fates, *source.match.fates, *other_fates(source, output.role)],
        problems=problems,
        finish=_finish_of(kinship, said),
        vocabulary=pairing.mode if pairing else "rows",
        added_tokens=tuple(pairing.names.values()) if pairing else (),
        dropped_tokens=pairing.dropped if pairing else (),
        left_out=companions.left_out,
        warnings=said,
        notes=notes_of_names(roles),
        began=options.began,
        relations=kinship.relations,
    )
    return do(job, options.run)


def _finish_of(kinship: Kinship, warnings: list[str]) -> Finish:
    """Append a warning if the digests show that the target is the base itself."""

    def finish(
        manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
    ) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
        warnings.append(warning_of_digests(kinship, silent))
        return nothing_more(manifest, results, silent)

    return finish if kinship.tasks else nothing_more


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
        head=bool(source.match.added),
    )
