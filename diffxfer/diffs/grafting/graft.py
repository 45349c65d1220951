"""Grafting: target + α·Δ, with Δ from a diff vector (`apply_diff`) or on the fly (`transfer`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.adapter import Adapter, read_adapter
from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.output_place import refuse_unsafe_output
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.kind import refuse_diff, require_diff
from diffxfer.diffs.delta.adapter_remarks import warnings_of_adapter
from diffxfer.diffs.delta.from_adapter import LORA, adapted_checkpoint, is_without_tokenizer
from diffxfer.diffs.delta.from_artifact import from_diff
from diffxfer.diffs.delta.from_checkpoints import from_checkpoints, read_roles
from diffxfer.diffs.extraction.extract import every_input, warn_of_one_model
from diffxfer.diffs.grafting.assembly import PlannedGraft, plan_graft
from diffxfer.diffs.grafting.move_adapter import move_adapter
from diffxfer.diffs.grafting.options import check_options
from diffxfer.diffs.grafting.pairing import label_source
from diffxfer.diffs.lora.options import check_apply_as, refuse_cluster
from diffxfer.diffs.matching.parts import pair_tensors
from diffxfer.diffs.matching.role import Role, read_role, shapes_of
from diffxfer.diffs.soundness.check import check_diff
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import listed
from diffxfer.streaming.plan import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.checkpoints.resolve import Place
    from diffxfer.diffs.grafting.options import GraftOptions
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.streaming.distribute import Cluster


def apply_diff(
    diff: Path | str,
    target: Path | str,
    out: Path | str,
    *,
    as_: str = "model",
    alpha: float = 1.0,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    added: str = "refuse",
    rename: Sequence[str] = (),
    vocab: str = "auto",
    out_dtype: str | None = None,
    requantize: bool = False,
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
    cluster: Cluster | None = None,
) -> Report:
    """Graft a diff vector onto a target: target + α·Δ.

    Args:
        diff: a diff vector that `extract_diff` made: a folder, or one on the Hub, ``"org/name"``
            or ``"org/name@revision"``.
        target: the checkpoint to graft onto, named the same way.
        out: the folder to create.
        as_: ``"model"`` writes the whole model; ``"lora"`` moves a LoRA adapter: its factors, with
            the target's names and tokens, scaled by alpha.
        alpha: the scale of Δ; 0 copies the target.
        alpha_for: scales by pattern of the target's tensor names; the last match wins.
        include: graft only tensors whose names match one of these patterns; copy the others.
        exclude: copy tensors whose names match one of these patterns.
        allow_missing: tensors that a role may lack: the target's are copied, others dropped.
        added: what to do with a head that fine-tuning added: ``"bring"`` it whole, ``"drop"`` it,
            or ``"refuse"``.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a role's tensors are paired.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        out_dtype: such as ``"bfloat16"``; None keeps the dtype of each of the target's tensors, and
            writes its quantised tensors in bfloat16.
        requantize: write the target's quantised tensors in their own format, with new scales.
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
        cluster: where the work is done in parts, such as `RayCluster`; None for this process.

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
        requantize=requantize,
        cluster=cluster,
    )
    out = Path(out)
    places = find(diff, "a diff vector"), find(target, "the target checkpoint")
    refuse_diff(places[1].folder, "target")
    if check_apply_as(as_, places[0].label, is_adapter=is_adapter(places[0])):
        refuse_cluster(cluster)
        role = read_role(open_checkpoint(places[1], "target"), options.renames)
        return move_adapter(read_adapter(places[0]), role, out, options)
    return plan_apply(places, out, options).make()


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
    requantize: bool = False,
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
    cluster: Cluster | None = None,
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
        out_dtype: such as ``"bfloat16"``; None keeps the dtype of each of the target's tensors, and
            writes its quantised tensors in bfloat16.
        requantize: write the target's quantised tensors in their own format, with new scales.
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
        cluster: where the work is done in parts, such as `RayCluster`; None for this process.

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
        requantize=requantize,
        cluster=cluster,
    )
    out = Path(out)
    return plan_transfer(finetuned, base, target, out, options).make()


def plan_apply(places: tuple[Place, Place], out: Path, options: GraftOptions) -> PlannedGraft:
    """Match and check the graft of a diff vector or an adapter.

    Args:
        places: where it is, and where the target is.
        out: the folder to create.
        options: the options.

    Raises:
        DiffxferError: for every known failure but tensors that cannot be matched.
    """
    refuse_diff(places[1].folder, "target")
    if is_adapter(places[0]):
        return _plan_adapter(read_adapter(places[0]), places[1], out, options)
    manifest = require_diff(places[0].folder)
    opened = open_checkpoint(places[1], "target")
    role = read_role(opened, options.renames)
    source = from_diff(places[0], manifest)
    check_diff(source.behaviour, {d.name: d.sources[0] for d in source.match.differences})
    inputs = every_input(places[0].folder, opened), [shard.path for shard in source.shards]
    refuse_unsafe_output(out, [*inputs[0], *inputs[1]], overwrite=options.run.overwrite)
    labels = label_source(source, role.checkpoint)
    return plan_graft(source, (role,), out, options, labels, (places[0].folder, manifest))


def plan_transfer(
    finetuned: Path | str, base: Path | str, target: Path | str, out: Path, options: GraftOptions
) -> PlannedGraft:
    """Match and check the graft of the difference of two checkpoints.

    Args:
        finetuned: the fine-tuned checkpoint.
        base: the checkpoint that finetuned was trained from.
        target: the checkpoint to graft onto.
        out: the folder to create.
        options: the options.

    Raises:
        DiffxferError: for every known failure but tensors that cannot be matched.
    """
    roles = read_roles({"finetuned": finetuned, "base": base, "target": target}, options.renames)
    opened = [role.checkpoint for role in roles.values()]
    refuse_unsafe_output(out, every_input(*opened), overwrite=options.run.overwrite)
    labels = label_roles(roles)
    source = from_checkpoints(
        roles["finetuned"],
        roles["base"],
        options.selection,
        lambda name: labels.get(name, name),
        options.vocab,
        options.added,
    )
    if is_without_tokenizer(opened[0]):
        source = replace(source, behaviour=opened[2].folder)
    # An adapter on its own base is merged: that is no mistake.
    is_merge = LORA in opened[0].weights.formats and (
        opened[1].weights.shards == opened[2].weights.shards
    )
    warnings = [*roles["finetuned"].warnings, *([] if is_merge else warn_of_one_model(*opened))]
    graft = source, tuple(roles.values()), out, options, labels, None, warnings
    return plan_graft(*graft, is_related=is_merge)


def _plan_adapter(
    adapter: Adapter, target: Place, out: Path, options: GraftOptions
) -> PlannedGraft:
    """Match and check the graft of an adapter's Δ, which needs no base."""
    role = read_role(open_checkpoint(target, "target"), options.renames)
    finetuned = adapted_checkpoint(adapter, role.checkpoint, is_base=False)
    opened = finetuned, role.checkpoint
    refuse_unsafe_output(out, every_input(*opened), overwrite=options.run.overwrite)
    # The target's tensors stand for base's, whose values no Δ of the adapter needs. Their tokens
    # are the adapter's own, as those of its base are.
    weights = replace(role.checkpoint.weights, folder=finetuned.folder)
    stand_in = replace(role.checkpoint, role="base", weights=weights)
    base = replace(role, checkpoint=stand_in, buffers={})
    roles = {"finetuned": Role(finetuned, {}, {}, 0, 0), "base": base, "target": role}
    labels = label_roles(roles)

    def label(name: str) -> str:
        return labels.get(name, name)

    made = from_checkpoints(roles["finetuned"], base, options.selection, label, options.vocab)
    entry = made.entries["finetuned"]
    source = replace(made, operation=Operation.APPLY, entries={"adapter": entry})
    warnings = warnings_of_adapter(adapter)
    if is_without_tokenizer(finetuned):
        source = replace(source, behaviour=target.folder)
        rows = [difference.name for difference in source.match.differences if difference.vocabulary]
        if rows and read_tokenizer(target.folder) is not None:
            warnings.append(
                "the adapter has no tokenizer: its rows of tokens keep their ids in "
                f"{listed(rows)}; put its tokenizer beside it if the target's differs"
            )
    return plan_graft(source, (role,), out, options, labels, None, warnings, is_related=True)


def label_roles(roles: Mapping[str, Role]) -> dict[str, str]:
    """The target's names of the tensors of finetuned and base, where it has them.

    Args:
        roles: finetuned, base and target by name.
    """
    labels: dict[str, str] = {}
    target = shapes_of(roles["target"])
    for role in ("base", "finetuned"):
        pairs = pair_tensors(target, shapes_of(roles[role]), ("the target", role))
        labels |= {theirs: ours for ours, theirs in pairs.items()}
    return labels
