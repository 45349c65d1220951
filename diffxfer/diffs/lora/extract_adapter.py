"""Extracting an adapter: Δ = finetuned − base, approximated by factors that PEFT loads."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.hub.repo_ids import cached_id
from diffxfer.diffs.artifact.manifest import FactorEntry, TensorEntry
from diffxfer.diffs.jobs.job import do
from diffxfer.diffs.lora.fit import fit_parts
from diffxfer.diffs.lora.held import Holder
from diffxfer.diffs.lora.names import PeftNames, peft_names
from diffxfer.diffs.lora.parts import Form, is_shared, sort_parts
from diffxfer.diffs.lora.peft_config import make_config
from diffxfer.diffs.lora.remarks import notes_of, refuse_empty, warnings_of
from diffxfer.diffs.lora.report import with_factors
from diffxfer.diffs.lora.tensors import AdapterTensors
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.jobs.job import Finish, Job, RunOptions
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.diffs.lora.options import LoraOptions
    from diffxfer.diffs.lora.parts import Part
    from diffxfer.diffs.matching.role import Role
    from diffxfer.streaming.statistics import TensorResult

_EXPERT = re.compile(r"\.experts\.\d+\.")


def extract_adapter(
    job: Job,
    source: Source,
    companions: Mapping[str, bytes | Path],
    roles: Sequence[Role],
    options: LoraOptions,
    run: RunOptions,
) -> Report:
    """Write the adapter of a fine-tuned model and its base.

    Args:
        job: the job without its tasks, and with the fates of tensors that are not in Δ.
        source: finetuned and base.
        companions: finetuned's companions, without code.
        roles: finetuned and base.
        options: what the adapter is like.
        run: how to run the job.

    Returns:
        What was done.

    Raises:
        MatchError: if Δ is zero, or has a tensor that no adapter can have.
        DiffxferError: for every other known failure; nothing is at the output then.
    """
    if job.problems:
        return do(job, run)
    finetuned, base = (role.checkpoint for role in roles)
    names = peft_names(base)
    tied = is_shared(source, (finetuned.config, base.config))
    parts = sort_parts(source, base.tensors, options.rest, names, tied=tied)
    parts = fit_parts(parts, names, options.rest)
    _refuse_uneven_experts(parts, options)
    shards = [shard for shard in source.shards if not run.stream]
    if not run.dry_run:
        fetch_shards(shards, run.progress, out=job.out)
    with Holder(job.out) as holder:
        made = AdapterTensors(source=source, options=options, run=run, holder=holder, tied=tied)
        made.add_all(parts, names)
        refuse_empty(made)
        config = _config(made, names, finetuned, base)
        files = {name: file for name, file in companions.items() if name != "config.json"}
        report = do(
            replace(
                job,
                tasks=made.tasks,
                indexed=False,
                files={**files, ADAPTER_CONFIG: config},
                command={**job.command, **options.command()},
                fates=[*made.fates, *job.fates],
                finish=_finish(made.entries, options),
                warnings=[*job.warnings, *warnings_of(made, names)],
                notes=[*job.notes, *notes_of(made)],
            ),
            replace(run, device="cpu"),
        )
    return with_factors(report, {} if run.dry_run else made.entries)


def _refuse_uneven_experts(parts: Sequence[Part], options: LoraOptions) -> None:
    """Refuse ranks that differ between experts, which transformers stacks."""
    single = [p for p in parts if p.form is Form.FACTORS and _EXPERT.search(p.difference.name)]
    sides = [min(part.difference.shape) for part in single]
    if not sides or (options.ranks.energy is None and options.ranks.most <= min(sides)):
        return
    raise OptionError(
        "--energy" if options.ranks.energy is not None else "--rank",
        "gives the experts of a layer different ranks, and PEFT needs equal ones",
        f"give --rank with at most {min(sides)}",
    )


def _config(
    made: AdapterTensors, names: PeftNames, finetuned: Checkpoint, base: Checkpoint
) -> bytes:
    modules = {
        names.of(name).removesuffix(".weight")
        for name, spec in base.tensors.items()
        if name.endswith(".weight") and len(spec.shape) > 1
    }
    if names.loaded is not None:
        modules = {*names.loaded.kinds}
    hub = cached_id(base.weights.shards[0].path.parent)
    return make_config(
        made.stored,
        modules,
        base=hub.repo if hub else str(base.folder.resolve()),
        revision=hub.revision if hub else None,
        config=finetuned.config,
    )


def _finish(entries: Mapping[str, FactorEntry], options: LoraOptions) -> Finish:
    """The `Finish` of an adapter: what it keeps, in the manifest."""

    def finish(
        manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
    ) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
        del silent
        tensors = ((name, TensorEntry(checksum=r.checksum)) for name, r in results.items())
        update = {"kind": "adapter", "dtype": options.diff_dtype, "factors": dict(entries)}
        return manifest.model_copy(update=update), tensors, {}

    return finish
