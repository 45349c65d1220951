"""Extracting Δ exactly, packed.

Two runs, since sizes are not known before: the first computes Δ in float64 and compresses it into a
temporary file (`packer`), the second copies the blocks to their places. The second one resumes like
any other: if the first one, made again, gives the same sizes, the layout is the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.encodings.packed import VERSION
from diffxfer.checkpoints.encodings.packing import LEVELS
from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.output_place import refuse_small_disk
from diffxfer.checkpoints.partial import unfinished_bytes
from diffxfer.diffs.artifact.manifest import PACKED_FORMAT
from diffxfer.diffs.extraction.pack_estimate import most_packed_bytes
from diffxfer.diffs.extraction.packer import Packer, Spool
from diffxfer.diffs.jobs.job import do
from diffxfer.errors import OptionError
from diffxfer.streaming.measure import measure_inputs
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, make_plan, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from diffxfer.diffs.artifact.manifest import Manifest, TensorEntry
    from diffxfer.diffs.extraction.packer import PackedBytes
    from diffxfer.diffs.jobs.job import Finish, Job, RunOptions
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.streaming.plan import Plan
    from diffxfer.streaming.statistics import TensorResult

EXACT = "exact"
"""The dtype option of a packed diff vector, in its manifest."""
_WHY_CPU = "differences are packed on the CPU"


def check_pack_options(pack: bool, level: int | None, as_: str, diff_dtype: str) -> int | None:
    """Check the options of packing.

    Args:
        pack: whether to pack.
        level: the level of compression, None for the default.
        as_: the kind of output.
        diff_dtype: the dtype option.

    Returns:
        The level, None if nothing is packed.

    Raises:
        OptionError: if the options contradict each other, or there is no such level.
    """
    if not pack:
        if level is not None:
            raise OptionError("--pack-level", "does nothing without --pack", "give --pack too")
        return None
    if as_ != "diff":
        raise OptionError("--pack", f"cannot be used with --as {as_}", "leave out one of them")
    if diff_dtype != "source":
        problem = "stores every difference exactly, whatever the dtype"
        raise OptionError("--pack", problem, "leave out --diff-dtype")
    if level is not None and level not in LEVELS:
        known = f"give {LEVELS[0]} to {LEVELS[-1]}"
        raise OptionError("--pack-level", f"{level} is no level of compression", known)
    return LEVELS[0] if level is None else level


def refuse_gpu(device: str) -> None:
    """Refuse a GPU for packing, where it could do nothing but subtract.

    Args:
        device: as the user gave it.

    Raises:
        OptionError: if it is a GPU.
    """
    if device.startswith("cuda"):
        problem = f"{device} cannot be used with --pack: {_WHY_CPU}"
        raise OptionError("--device", problem, "leave out --device")


def extract_packed(job: Job, options: RunOptions, level: int) -> Report:
    """Extract a packed diff vector.

    Args:
        job: the job of a plain one, in finetuned's dtypes.
        options: how to run it.
        level: the level of compression.

    Returns:
        What was done.

    Raises:
        DiffxferError: for every known failure; nothing is at the output then.
    """
    del job.command["diff_dtype"]
    job.command |= {"pack": EXACT, "pack_level": level}
    plain_bytes = make_plan(job.tasks, job.inputs).bytes_to_write
    brought = [task for task in job.tasks if task.operation is Operation.BRING]
    plan = exact_plan(job)
    on_cpu = replace(options, device="cpu")
    if job.problems:
        return do(job, on_cpu)
    if options.dry_run:
        most = most_packed_bytes(plan, level) + sum(task.inputs[0].nbytes for task in brought)
        report = replace(do(job, on_cpu), bytes_to_write=most, packed_estimate=most)
    else:
        report = _pack(job, plan, brought, on_cpu, level)
    return replace(
        report,
        unpacked_bytes=plain_bytes,
        bytes_to_read=plan.bytes_to_read,
        device_why=_WHY_CPU if options.device == "auto" else "",
    )


def _pack(
    job: Job, plan: Plan, brought: Sequence[TensorTask], options: RunOptions, level: int
) -> Report:
    """Compress every difference, then write them."""
    if not options.stream:
        shards = (stored.shard for task in plan.tasks for stored in task.inputs)
        fetch_shards(shards, options.progress, out=job.out)
    # Every block is on the disk twice at the end: in the temporary file, and at its place.
    needed = 2 * most_packed_bytes(plan, level) + sum(task.inputs[0].nbytes for task in brought)
    refuse_small_disk(job.out, needed, unfinished_bytes(job.out))
    with Spool(job.out) as spool:
        packer = Packer(plan, spool, level)
        results = measure_inputs(
            plan,
            threads=options.threads,
            progress=options.progress,
            sinks=packer.sinks,
            observe=packer.observe,
            allow_nonfinite=options.allow_nonfinite,
        )
        packed = packer.packed()
        job.tasks = [*map(_copy, packed), *brought]
        job.finish = _finish(job.finish, plan, results, packed)
        return do(job, options)


def estimate_packing(job: Job) -> int | None:
    """An estimate of what a plain diff vector would take if it were packed.

    Args:
        job: the job of the plain one.

    Returns:
        Bytes; None if the models are not on this disk, since the estimate is not worth fetching.

    Raises:
        DiffxferError: if an input cannot be read, or has changed.
    """
    if job.problems or any(shard.away for shard in job.inputs):
        return None
    whole = (task.inputs[0].nbytes for task in job.tasks if task.operation is Operation.BRING)
    return most_packed_bytes(exact_plan(job)) + sum(whole)


def exact_plan(job: Job) -> Plan:
    """The plan that computes every difference of a job in float64.

    Args:
        job: the job of a plain diff vector.
    """
    computed = (task for task in job.tasks if task.operation is not Operation.BRING)
    return make_plan([_in_float64(task) for task in computed], job.inputs)


def _in_float64(task: TensorTask) -> TensorTask:
    """The same task in float64; finetuned is given back bit for bit if it is stored itself."""
    if task.shard is None:
        return task
    is_stored = task.operation is Operation.SUBTRACT
    return replace(task, operation=Operation.EXACT if is_stored else task.operation, dtype="F64")


def _copy(stored: PackedBytes) -> TensorTask:
    """The task that writes the bytes of a packed tensor."""
    return TensorTask(
        name=stored.name,
        operation=Operation.KEEP,
        inputs=(stored,),
        dtype=stored.dtype,
        shape=stored.shape,
        runs=whole(RunKind.COPY, 1),
        shard=stored.task.shard,
    )


def _written(
    plan: Plan, results: Sequence[TensorResult]
) -> Iterator[tuple[TensorTask, TensorResult]]:
    found = zip(plan.tasks, results, strict=True)
    return ((task, result) for task, result in found if task.shard is not None)


def _finish(
    complete: Finish, plan: Plan, results: Sequence[TensorResult], packed: Sequence[PackedBytes]
) -> Finish:
    """Complete the manifest by what the first run has measured, and by how tensors are packed."""
    measured = {task.name: result for task, result in _written(plan, results)}
    found = zip(plan.tasks, results, strict=True)
    digested = {task.name: result.checksum for task, result in found if task.shard is None}
    by_name = {stored.name: stored for stored in packed}

    def finish(
        manifest: Manifest, written: Mapping[str, TensorResult], silent: Mapping[str, str]
    ) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
        del silent
        results = {name: measured.get(name, result) for name, result in written.items()}
        manifest, entries, files = complete(manifest, results, digested)
        described = (
            (name, _described(entry, by_name[name], written[name]) if name in by_name else entry)
            for name, entry in entries
        )
        update = {"diffxfer_format": PACKED_FORMAT, "packing": VERSION, "dtype": EXACT}
        return manifest.model_copy(update=update), described, files

    return finish


def _described(entry: TensorEntry, stored: PackedBytes, written: TensorResult) -> TensorEntry:
    return replace(
        entry,
        checksum=stored.checksum,
        dtype=stored.packed_dtype,
        shape=stored.task.shape,
        exceptions=stored.lost or None,
        stored=written.checksum,
    )
