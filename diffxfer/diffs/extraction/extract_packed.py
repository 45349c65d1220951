"""Extracting Δ packed: exactly, or rounded to a few bits.

Two runs, since sizes are not known before: the first computes Δ in float64 and compresses it into a
file in the partial folder (`compress`), the second copies the blocks to their places. Both have one
journal, so that either resumes. The fingerprint is of the first one's plan: what its result depends
on is all that sizes depend on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.encodings.packed import VERSION
from diffxfer.checkpoints.encodings.packing import LEVELS, version
from diffxfer.checkpoints.encodings.rounding import ROUNDINGS
from diffxfer.checkpoints.fetch import fetch_shards, missing_files
from diffxfer.checkpoints.output_place import refuse_small_disk
from diffxfer.diffs.artifact.distances import Distance, by_layer, together, worst_of
from diffxfer.diffs.artifact.lossy import LossyEntry
from diffxfer.diffs.artifact.manifest import PACKED_FORMAT
from diffxfer.diffs.extraction.compress import compress
from diffxfer.diffs.extraction.pack_estimate import most_packed_bytes
from diffxfer.diffs.extraction.spool import SPOOL_NAME, Spool
from diffxfer.diffs.jobs.job import Begun, do, output_folder
from diffxfer.errors import OptionError
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, make_plan, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from diffxfer.checkpoints.encodings.rounding import Rounding
    from diffxfer.diffs.artifact.manifest import Manifest, TensorEntry
    from diffxfer.diffs.extraction.spool import PackedBytes
    from diffxfer.diffs.jobs.job import Finish, Job, RunOptions
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.streaming.distribute import Cluster
    from diffxfer.streaming.plan import Plan
    from diffxfer.streaming.statistics import TensorResult

EXACT = "exact"
"""The form of a packed diff vector that loses nothing."""
PACKINGS = (EXACT, *ROUNDINGS)
"""The forms of a packed diff vector."""
_WHY_CPU = "differences are packed on the CPU"
_IN_FLOAT64 = (
    "the difference of an adapter is exact only in float64, so packed it may be larger than plain;"
    " --pack int8 rounds it, and is smaller"
)


def _lossy_form(pack: bool | str) -> Rounding | None:
    """The lossy form that an option of packing names.

    Args:
        pack: the option; False and True, which is ``"exact"``, too.

    Returns:
        The form, None if nothing is lost.

    Raises:
        OptionError: if there is no such form.
    """
    if isinstance(pack, bool) or pack == EXACT:
        return None
    if pack not in ROUNDINGS:
        raise OptionError("--pack", f"{pack!r} is unknown", f"use one of {', '.join(PACKINGS)}")
    return ROUNDINGS[pack]


def check_pack_options(
    pack: bool | str, level: int | None, as_: str, diff_dtype: str
) -> int | None:
    """Check the options of packing.

    Args:
        pack: whether to pack, and how.
        level: the level of compression, None for the default.
        as_: the kind of output.
        diff_dtype: the dtype option.

    Returns:
        The level, None if nothing is packed.

    Raises:
        OptionError: if the options contradict each other, or there is no such level.
    """
    if pack is False:
        if level is not None:
            raise OptionError("--pack-level", "does nothing without --pack", "give --pack too")
        return None
    if as_ != "diff":
        raise OptionError("--pack", f"cannot be used with --as {as_}", "leave out one of them")
    rounding = _lossy_form(pack)
    if diff_dtype != "source":
        problem = "stores every difference exactly, whatever the dtype"
        if rounding is not None:
            problem = f"{rounding.name} says how a difference is stored"
        raise OptionError("--pack", problem, "leave out --diff-dtype")
    if level is not None and level not in LEVELS:
        known = f"give {LEVELS[0]} to {LEVELS[-1]}"
        raise OptionError("--pack-level", f"{level} is no level of compression", known)
    return LEVELS[0] if level is None else level


def refuse_packing_on(device: str, cluster: Cluster | None) -> None:
    """Refuse a GPU for packing, where it could do nothing but subtract, and a cluster.

    Args:
        device: as the user gave it.
        cluster: where the work should be done.

    Raises:
        OptionError: if it is a GPU or a cluster.
    """
    if device.startswith("cuda"):
        problem = f"{device} cannot be used with --pack: {_WHY_CPU}"
        raise OptionError("--device", problem, "leave out --device")
    if cluster is not None:
        problem = "cannot be used with --pack: the places of packed tensors depend on each other"
        raise OptionError("--ray", problem, "leave out one of them")


def extract_packed(job: Job, options: RunOptions, pack: bool | str, level: int) -> Report:
    """Extract a packed diff vector.

    Args:
        job: the job of a plain one, in finetuned's dtypes.
        options: how to run it.
        pack: how to pack, one of `PACKINGS` or True.
        level: the level of compression.

    Returns:
        What was done.

    Raises:
        DiffxferError: for every known failure; nothing is at the output then.
    """
    rounding = _lossy_form(pack)
    del job.command["diff_dtype"]
    job.command |= {"pack": rounding.name if rounding else EXACT, "pack_level": level}
    plain = make_plan(job.tasks, job.inputs)
    brought = [task for task in job.tasks if task.operation is Operation.BRING]
    if rounding is None and _is_of_adapter(job):
        job.notes.append(_IN_FLOAT64)
    plan = exact_plan(job)
    on_cpu = replace(options, device="cpu")
    if job.problems:
        return do(job, on_cpu)
    if options.dry_run:
        most = most_packed_bytes(plan, level, rounding)
        most += sum(task.inputs[0].nbytes for task in brought)
        report = replace(do(job, on_cpu), bytes_to_write=most, packed_estimate=most)
    else:
        report = _pack(job, plan, brought, on_cpu, (level, rounding), plain.bytes_to_write)
    return replace(
        report,
        unpacked_bytes=plain.bytes_to_write,
        bytes_to_read=plain.bytes_to_read,
        device_why=_WHY_CPU if options.device == "auto" else "",
    )


def _pack(
    job: Job,
    plan: Plan,
    brought: Sequence[TensorTask],
    options: RunOptions,
    how: tuple[int, Rounding | None],
    plain_bytes: int,
) -> Report:
    """Compress every difference, then write them."""
    everything = make_plan([*plan.tasks, *brought], job.inputs)
    made_by = VERSION, version()
    read = [] if options.stream else [i.shard for task in everything.tasks for i in task.inputs]
    to_fetch = sum(file.size for file in missing_files(read))
    with (
        output_folder(job, everything, options, made_by=made_by, scratch=SPOOL_NAME) as folder,
        Spool(folder) as spool,
    ):
        fetch_shards(read, options.progress, out=job.out)
        if not folder.resumed:
            # Every block is on the disk twice at the end: in the spool, and at its place.
            needed = 2 * most_packed_bytes(plan, *how)
            needed += sum(task.inputs[0].nbytes for task in brought)
            refuse_small_disk(job.out, needed)
        made = compress(plan, brought, folder, spool, how, options, further_bytes=plain_bytes)
        packed, results = made.packed, made.results
        job.tasks = [*map(_copy, packed), *brought]
        measured = {task.name: result for task, result in _written(plan, results)}
        lost = _lost(packed, measured) if how[1] else ()
        job.finish = _finish(job.finish, plan, results, packed, lost)
        report = do(job, options, Begun(folder, made.chunks, plan.bytes_to_read))
    inexact = {each.name: measured[each.name].inexact for each in packed if each.error is None}
    return replace(
        report,
        inexact={name: count for name, count in inexact.items() if count},
        lossy=lost,
        bytes_to_fetch=to_fetch,
        resumed_bytes=made.resumed_bytes + report.resumed_bytes,
    )


def estimate_packing(job: Job) -> int | None:
    """An estimate of what a plain diff vector would take if it were packed.

    Args:
        job: the job of the plain one.

    Returns:
        Bytes; None if the models are not on this disk, since the estimate is not worth fetching, or
        if finetuned is an adapter, whose difference takes float64.

    Raises:
        DiffxferError: if an input cannot be read, or has changed.
    """
    if job.problems or _is_of_adapter(job) or any(shard.away for shard in job.inputs):
        return None
    whole = (task.inputs[0].nbytes for task in job.tasks if task.operation is Operation.BRING)
    return most_packed_bytes(exact_plan(job)) + sum(whole)


def _is_of_adapter(job: Job) -> bool:
    """Whether Δ itself is stored, as the product of factors."""
    return any(task.operation is Operation.STORE for task in job.tasks)


def exact_plan(job: Job) -> Plan:
    """The plan that computes every difference of a job in float64.

    Args:
        job: the job of a plain diff vector.
    """
    computed = (task for task in job.tasks if task.operation is not Operation.BRING)
    return make_plan([_in_float64(task) for task in computed], job.inputs)


def _lost(
    packed: Sequence[PackedBytes], measured: Mapping[str, TensorResult]
) -> tuple[Distance, ...]:
    """How far each tensor is from Δ, 0 if it is exact; without those that are not finite."""
    return tuple(
        Distance(each.name, each.error or 0.0, measured[each.name].delta_norm)
        for each in packed
        if math.isfinite(measured[each.name].delta_norm)
    )


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
    complete: Finish,
    plan: Plan,
    results: Sequence[TensorResult],
    packed: Sequence[PackedBytes],
    lost: Sequence[Distance],
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
        form = str(manifest.command["pack"])
        update: dict[str, object] = {"diffxfer_format": PACKED_FORMAT, "packing": VERSION}
        update |= {"dtype": form, "lossy": None if form == EXACT else _entry(form, lost)}
        return manifest.model_copy(update=update), described, files

    return finish


def _entry(form: str, lost: Sequence[Distance]) -> LossyEntry:
    """What is lost in all, in the worst tensor, and in each layer."""
    worst = worst_of(lost) if lost else Distance("", 0.0, 0.0)
    return LossyEntry(
        form="int4" if form == "int4" else "int8",
        error=together(lost).ratio or 0.0,
        worst=worst.ratio or 0.0,
        worst_tensor=worst.name,
        layers={layer.name: layer.ratio or 0.0 for layer in by_layer(lost)},
    )


def _described(entry: TensorEntry, stored: PackedBytes, written: TensorResult) -> TensorEntry:
    return replace(
        entry,
        error_norm=stored.error,
        inexact=entry.inexact if stored.error is None else None,
        checksum=stored.checksum,
        dtype=stored.packed_dtype,
        shape=stored.task.shape,
        exceptions=stored.lost or None,
        stored=written.checksum,
    )
