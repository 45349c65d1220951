"""The common part of all verbs: plan a job, check it, run it, publish the result."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import README, read_bytes
from diffxfer.checkpoints.fetch import fetch_shards, missing_files
from diffxfer.checkpoints.output_place import MANIFEST_NAME, free_bytes, refuse_small_disk
from diffxfer.checkpoints.partial import find_unfinished
from diffxfer.checkpoints.shard_index import names_like
from diffxfer.checkpoints.stored import stat_identity
from diffxfer.checkpoints.writer import OutputFolder, index_json
from diffxfer.diffs.artifact.card import write_card
from diffxfer.diffs.artifact.manifest import (
    FileEntry,
    VocabularyEntry,
    manifest_bytes,
)
from diffxfer.diffs.jobs.damaged_inputs import refuse_damaged
from diffxfer.diffs.jobs.fingerprint import fingerprint
from diffxfer.diffs.jobs.job_manifest import make_manifest
from diffxfer.diffs.jobs.make_report import make_report
from diffxfer.diffs.jobs.report import Report, losses
from diffxfer.diffs.jobs.run_options import RunOptions as RunOptions  # noqa: TC001 for others
from diffxfer.diffs.jobs.shards import cut_shards
from diffxfer.diffs.jobs.work import Job as Job  # noqa: TC001 for others
from diffxfer.diffs.jobs.work import nothing_more as nothing_more
from diffxfer.diffs.matching.refusal import group_problems, refusal
from diffxfer.errors import InputChangedError
from diffxfer.streaming.device import choose_device
from diffxfer.streaming.plan import Plan, make_plan
from diffxfer.streaming.run import default_threads, run_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from diffxfer.diffs.jobs.work import Finish as Finish
    from diffxfer.errors import Culprits
    from diffxfer.streaming.statistics import TensorResult

_JOURNAL_SHARE = 2048
"""A journal takes a few hundred bytes for every half MiB that is written."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A job of two plans whose first one has run.

    Attributes:
        folder: the output folder, inside its `with` block.
        chunks: the number of the first plan's chunks.
        moved_bytes: the bytes that it moved.
    """

    folder: OutputFolder
    chunks: int
    moved_bytes: int


def do(job: Job, options: RunOptions, begun: Begun | None = None) -> Report:
    """Plan a job, run it and publish the folder; a dry run stops after the plan.

    Args:
        job: the work.
        options: how to run it.
        begun: what was done before, if the job has two plans.

    Returns:
        What was done.

    Raises:
        MatchError: if tensors cannot be matched, unless it is a dry run.
        DiffxferError: for every other known failure; nothing is at the output then.
    """
    plan, refused = plan_job(job, options)
    choice = choose_device(options.device, plan, options.threads or default_threads())
    free = free_bytes(job.out)
    read = [] if options.stream else [spec.shard for task in plan.tasks for spec in task.inputs]
    to_fetch = sum(file.size for file in missing_files(read))
    if options.dry_run:
        kept = find_unfinished(job.out)
        job.warnings += [f"an unfinished run has the same output: {kept}"] if kept else []
        return make_report(job, plan, free, choice, to_fetch, refused=refused)
    if begun is not None:
        plan = replace(plan, first_chunk=begun.chunks)
    with nullcontext(begun.folder) if begun else output_folder(job, plan, options) as folder:
        needed, held = _needed(job, plan), folder.held_bytes()
        refuse_small_disk(job.out, needed, held)
        fetch_shards(read, options.progress, out=job.out, needed=needed - held)
        results, resumed = run_plan(
            plan,
            folder,
            threads=options.threads,
            device=choice.device,
            device_memory=options.device_memory,
            allow_nonfinite=options.allow_nonfinite,
            progress=options.progress,
            cluster=options.cluster,
            earlier_bytes=begun.moved_bytes if begun else 0,
        )
        refuse_damaged(plan, results)
        by_name = {
            task.name: result
            for task, result in zip(plan.tasks, results, strict=True)
            if task.shard is not None
        }
        silent = _silent(plan, results)
        if job.observe is not None:
            job.observe(silent)
        checksums = {name: result.checksum for name, result in silent.items()}
        _write_rest(job, plan, folder, by_name, checksums)
        folder.publish()
    return make_report(job, plan, free, choice, to_fetch, results=by_name, resumed=resumed)


def plan_job(job: Job, options: RunOptions) -> tuple[Plan, tuple[Culprits, ...]]:
    """Check a job and plan it; adds its warnings and empties its list of tasks.

    Args:
        job: the work.
        options: how to run it.

    Returns:
        The plan, and in a dry run the tensors that cannot be matched.

    Raises:
        MatchError: if tensors cannot be matched, unless it is a dry run.
    """
    job.identities = {
        name: stat_identity(content.stat())
        for name, content in job.files.items()
        if not isinstance(content, bytes)
    }
    refused = group_problems(job.problems)
    if not refused:
        job.warnings += losses(job.fates, job.dropped_tokens)
    if refused and not options.dry_run:
        raise refusal(refused)
    plan = make_plan(cut_shards(job.tasks, options.max_shard_bytes), job.inputs)
    job.tasks.clear()  # the plan holds its own copies, with their places
    return plan, refused


def output_folder(
    job: Job,
    plan: Plan,
    options: RunOptions,
    *,
    made_by: tuple[object, ...] = (),
    scratch: str = "",
) -> OutputFolder:
    """The output folder of a job.

    Args:
        job: the job.
        plan: its plan, the first one if there are two.
        options: how it is run.
        made_by: what the result depends on besides the plan and the options.
        scratch: the name of a file that is needed until the folder is complete.
    """
    described = (job.verb, sorted(job.command.items()), sorted(job.sources.items()), *made_by)
    return OutputFolder(
        job.out,
        fingerprint(plan, job.files, described),
        overwrite=options.overwrite,
        restart=options.restart,
        scratch=scratch,
    )


def _silent(plan: Plan, results: Sequence[TensorResult]) -> dict[str, TensorResult]:
    """The results of tasks that write nothing, by name."""
    return {
        task.name: result
        for task, result in zip(plan.tasks, results, strict=True)
        if task.shard is None
    }


def _needed(job: Job, plan: Plan) -> int:
    """The disk space of a job in bytes: shards, companions, and the journal while it runs."""
    companions = sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in job.files.values()
    )
    return plan.bytes_to_write + companions + plan.bytes_to_write // _JOURNAL_SHARE


def _write_rest(
    job: Job,
    plan: Plan,
    folder: OutputFolder,
    results: Mapping[str, TensorResult],
    silent: Mapping[str, str],
) -> None:
    """Write index, companions, card and manifest; the manifest names the others, so it is last."""
    files: dict[str, bytes | Path] = dict(job.files)
    names = names_like(plan.layouts)
    if job.indexed or len(plan.layouts) > 1 or names.single not in plan.layouts:
        written = [task for task in plan.tasks if task.shard is not None]
        files[names.index] = index_json(
            {name: tuple(layout.starts) for name, layout in plan.layouts.items()},
            sum(task.elements for task in written),
            sum(task.elements * task.itemsize for task in written),
        )
    vocabulary = VocabularyEntry(
        pairing=job.vocabulary, added=list(job.added_tokens), dropped=list(job.dropped_tokens)
    )
    made = make_manifest(job.verb, job.command, vocabulary, job.sources, plan)
    manifest, tensors, more = job.finish(made, results, silent)
    files |= more
    files[README] = write_card(job.out.absolute().name, manifest)
    entries: dict[str, FileEntry] = {}
    for name, content in sorted(files.items()):
        data = content if isinstance(content, bytes) else companion_bytes(job, name)
        entries[name] = FileEntry(size=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))
        folder.write_file(name, data)
    manifest = manifest.model_copy(update={"files": entries})
    folder.write_file(MANIFEST_NAME, manifest_bytes(manifest, tensors))


def companion_bytes(job: Job, name: str) -> bytes:
    """The bytes of a companion; a file must not have changed since the job was planned.

    Args:
        job: the planned job.
        name: one of its files.

    Raises:
        InputChangedError: if the file has changed.
        CompanionError: if it cannot be read.
    """
    content = job.files[name]
    if isinstance(content, bytes):
        return content
    data = read_bytes(content)
    if stat_identity(content.stat()) != job.identities[name]:
        raise InputChangedError(
            content,
            "changed during the run",
            "run it again, and do not change the inputs while it runs",
        )
    return data
