"""Extracting Δ = finetuned − base, stored as a self-contained artifact or as an adapter."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import refuse_unsafe_output
from diffxfer.diffs.companions.inherit import diff_companions
from diffxfer.diffs.delta.from_adapter import LORA
from diffxfer.diffs.delta.from_checkpoints import (
    COMPANIONS,
    Source,
    from_checkpoints,
    notes_of_formats,
    read_roles,
)
from diffxfer.diffs.extraction.complete_manifest import complete_manifest
from diffxfer.diffs.extraction.extract_packed import (
    check_pack_options,
    estimate_packing,
    extract_packed,
    refuse_packing_on,
)
from diffxfer.diffs.extraction.extract_tasks import extract_tasks
from diffxfer.diffs.jobs.job import Job, RunOptions, do
from diffxfer.diffs.jobs.shards import parse_size
from diffxfer.diffs.lora.extract_adapter import extract_adapter
from diffxfer.diffs.lora.options import check_lora_options, refuse_cluster
from diffxfer.diffs.matching.added import check_added
from diffxfer.diffs.matching.match import ADDED, BUFFER, IN_BASE, UNCHANGED, Fate
from diffxfer.diffs.matching.rename import names_command, parse_renames
from diffxfer.diffs.matching.role import notes_of_names
from diffxfer.diffs.matching.selection import make_selection
from diffxfer.diffs.relations.kinship import kinship_of_diff
from diffxfer.diffs.soundness.check import check_roles
from diffxfer.diffs.vocab.pair_base import check_mode
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import MatchError, OptionError
from diffxfer.streaming.plan import Operation
from diffxfer.streaming.run import check_run_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.streaming.distribute import Cluster
    from diffxfer.streaming.plan import TensorTask

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Torch's dtype names, mapped to those of safetensors."""

_TABLES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")


def extract_diff(
    finetuned: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    as_: str = "diff",
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    rest: str = "modules_to_save",
    exact: bool = False,
    diff_dtype: str = "source",
    pack: bool | str = False,
    pack_level: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    added: str = "refuse",
    rename: Sequence[str] = (),
    vocab: str = "auto",
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
    """Write the diff vector of a fine-tuned model and its base, or a LoRA adapter.

    Args:
        finetuned: the fine-tuned checkpoint: a folder, or a model on the Hub, ``"org/name"`` or
            ``"org/name@revision"``.
        base: the checkpoint that finetuned was trained from, named the same way.
        out: the folder to create.
        as_: ``"diff"`` writes Δ itself; ``"lora"`` writes the best factors of low rank of each
            matrix, as an adapter for PEFT.
        rank: for an adapter, the rank of every matrix; 32 by default.
        energy: for an adapter, the share of each matrix's ‖Δ‖² to keep, by the smallest rank.
        max_rank: with `energy`, the largest rank; 128 by default.
        rest: for an adapter, how it stores tensors that are no weights of linear layers:
            ``"modules_to_save"`` stores finetuned's tensors whole, ``"lora"`` stores factors of
            embeddings and heads and drops norms and biases, ``"drop"`` drops all of them.
        exact: for an adapter, compute the factors to the last digits, which takes longer.
        diff_dtype: ``"source"`` rounds Δ once, to finetuned's own dtypes; ``"float32"`` restores
            nearly every element of a 16-bit checkpoint exactly; ``"float64"``, ``"bfloat16"``
            and ``"float16"`` are allowed too.
        pack: store Δ compressed: ``"exact"`` or True so that `apply_diff` on base gives finetuned
            back; ``"int8"`` and ``"int4"`` round it to so many bits an element.
        pack_level: how hard to compress, 1 to 19; 1 by default.
        include: only tensors whose names match one of these patterns.
        exclude: no tensors whose names match one of these patterns.
        allow_missing: tensors that finetuned or base may lack; they are dropped.
        added: what to do with a head that fine-tuning added: ``"bring"`` stores it whole,
            ``"drop"`` leaves it out, ``"refuse"`` refuses.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a role's tensors are paired; the diff
            vector stores finetuned's new names.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        allow_nonfinite: let NaN, infinity and overflow through.
        allow_unrelated: subtract even if the two models are unrelated.
        max_shard_size: such as ``"5GB"``; None keeps finetuned's division into shards.
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
        >>> extract_diff("llama-3.0-sft", "llama-3.0", "sft-diff")  # doctest: +SKIP
    """
    began = time.perf_counter()
    out = Path(out)
    if diff_dtype != "source" and diff_dtype not in DTYPES:
        known = ", ".join(("source", *DTYPES))
        raise OptionError("--diff-dtype", f"{diff_dtype!r} is unknown", f"use one of {known}")
    lora = check_lora_options(
        as_,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        rest=rest,
        exact=exact,
        diff_dtype=diff_dtype,
        dtype=DTYPES.get(diff_dtype),
        max_shard_size=max_shard_size,
    )
    if lora is not None:
        refuse_cluster(cluster)
    level = check_pack_options(pack, pack_level, as_, diff_dtype)
    if level is not None:
        refuse_packing_on(device, cluster)
    check_mode(vocab)
    check_run_options(threads, device, cluster)
    memory = parse_size(device_memory, "--device-memory")
    max_shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    check_added(added)
    renames = parse_renames(rename, ("finetuned", "base"))
    selection = make_selection(include=include, exclude=exclude, allow_missing=allow_missing)
    roles = tuple(read_roles({"finetuned": finetuned, "base": base}, renames).values())
    opened = tuple(role.checkpoint for role in roles)
    refuse_unsafe_output(out, every_input(*opened), overwrite=overwrite)
    selection.refuse_unused({name for r in roles for name in (*r.checkpoint.tensors, *r.buffers)})
    source = from_checkpoints(roles[0], roles[1], selection, lambda name: name, vocab, added)
    if not source.match.differences and not source.match.problems:
        raise MatchError((), "no tensor is left to extract", "check --include and --exclude")
    odd = [] if source.match.problems else check_roles(*opened, graft=False)
    kinship = kinship_of_diff(
        () if source.match.problems else source.match.differences, allow_unrelated=allow_unrelated
    )
    companions = diff_companions(opened[0].folder)
    files = {**_borrowed_table(opened[0].folder, opened[1].folder), **companions.files}
    whole = opened[LORA in opened[0].weights.formats]
    last_shard = whole.weights.shards[-1].path.name
    tasks = [] if lora else extract_tasks(source, DTYPES.get(diff_dtype), last_shard)
    job = Job(
        verb="extract",
        out=out,
        tasks=tasks,
        inputs=source.shards,
        indexed=opened[0].weights.indexed and max_shard_bytes is None,
        files={f"{COMPANIONS}/{name}": content for name, content in files.items()},
        command={
            "diff_dtype": diff_dtype,
            **selection.command(),
            **names_command(added, renames),
            "vocab": vocab,
            "max_shard_size": max_shard_size or "finetuned",
            "allow_nonfinite": str(allow_nonfinite).lower(),
        },
        sources=source.entries,
        fates=_fates(source, tasks),
        problems=source.match.problems,
        finish=complete_manifest(source, diff_dtype),
        vocabulary=source.vocabulary.pairing_mode,
        added_tokens=tuple(source.vocabulary.added.values()),
        left_out=companions.left_out,
        warnings=[
            *roles[0].warnings,
            *warn_of_one_model(opened[0], opened[1]),
            *odd,
            *kinship.warnings,
            *source.vocabulary.warnings,
            *companions.warnings,
        ],
        notes=[*notes_of_names(roles), *notes_of_formats(opened)],
        began=began,
        relations=kinship.relations,
    )
    options = RunOptions(
        *(threads, device, memory, allow_nonfinite, max_shard_bytes, overwrite, restart, dry_run),
        progress=progress,
        stream=stream,
        cluster=cluster,
    )
    if lora is not None:
        return extract_adapter(job, source, companions.files, roles, lora, options)
    if level is not None:
        return extract_packed(job, options, pack, level)
    estimate = None if dry_run else estimate_packing(job)
    return replace(do(job, options), packed_estimate=estimate)


def _borrowed_table(finetuned: Path, base: Path) -> dict[str, bytes | Path]:
    """Base's token table if finetuned has none; finetuned is assumed to use the same one."""
    if read_tokenizer(finetuned) is not None or read_tokenizer(base) is None:
        return {}
    return {name: path for name, path in diff_companions(base).files.items() if name in _TABLES}


def every_input(*inputs: Path | Checkpoint) -> list[Path]:
    """The folders and their shard files; a shard may be a link to a file elsewhere.

    Args:
        inputs: folders and opened checkpoints.
    """
    paths = [item if isinstance(item, Path) else item.folder for item in inputs]
    opened = [item for item in inputs if not isinstance(item, Path)]
    return [*paths, *(shard.path for item in opened for shard in item.weights.shards)]


def warn_of_one_model(
    finetuned: Checkpoint, base: Checkpoint, target: Checkpoint | None = None
) -> list[str]:
    """Warn if two roles have the same files, which is most likely a mistake.

    Args:
        finetuned: the fine-tuned checkpoint.
        base: its base.
        target: the target, if there is one.
    """
    files = {
        checkpoint.role: {shard.identity for shard in checkpoint.weights.shards}
        for checkpoint in (finetuned, base, target)
        if checkpoint is not None
    }
    warnings = []
    if files["finetuned"] == files["base"]:
        warnings.append("finetuned and base are the same files: their difference is zero")
    if files["base"] == files.get("target"):
        warnings.append("base and target are the same files: alpha 1 gives finetuned back")
    if files["finetuned"] == files.get("target"):
        warnings.append("finetuned and target are the same files: check the order of the arguments")
    return warnings


def _fates(source: Source, tasks: Sequence[TensorTask]) -> list[Fate]:
    match = source.match
    written = [task for task in tasks if task.shard is not None]
    return [
        *(
            Fate("brought", task.name, task.elements, ADDED)
            if task.operation is Operation.BRING
            else Fate("extracted", task.name, task.elements)
            for task in written
        ),
        *(
            Fate("kept", ours.name, ours.elements, f"{ours.dtype} is not part of a diff vector")
            for ours, _ in match.integers
        ),
        *(Fate("left out", name, elements) for name, elements in match.left_out.items()),
        *(Fate("left out", n, elements, UNCHANGED) for n, elements in match.unchanged.items()),
        *(Fate("dropped", name, elements, BUFFER) for name, elements in source.buffers.items()),
        *(Fate("dropped", name, elements, IN_BASE) for name, elements in match.in_base.items()),
        *match.fates,
    ]
