"""The report of a job, from its plan and its results."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from diffxfer.diffs.jobs.report import Report, count_fates, group_fates, remarks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.jobs.work import Job
    from diffxfer.errors import Culprits
    from diffxfer.streaming.device import Choice
    from diffxfer.streaming.plan import Plan
    from diffxfer.streaming.statistics import TensorResult


def make_report(
    job: Job,
    plan: Plan,
    free: int,
    choice: Choice,
    to_fetch: int,
    *,
    resumed: int = 0,
    results: Mapping[str, TensorResult] | None = None,
    refused: tuple[Culprits, ...] = (),
) -> Report:
    """The report of a job.

    Args:
        job: the job.
        plan: its plan.
        free: free bytes on the disk of the output.
        choice: where the arithmetic runs.
        to_fetch: bytes to download, or that were downloaded.
        resumed: bytes that an earlier run has moved.
        results: the results of the tensors that were written; None for a dry run.
        refused: tensors that cannot be matched.
    """
    groups = group_fates(job.fates)
    tensors, parameters = count_fates(groups)
    if refused:
        tensors["refused"] = sum(len(group.names) for group in refused)
    inexact = {name: result.inexact for name, result in (results or {}).items() if result.inexact}
    return Report(
        command=job.verb,
        output=job.out,
        written=results is not None,
        tensors=tensors,
        parameters=parameters,
        plan=groups,
        refused=refused,
        bytes_to_read=plan.bytes_to_read,
        bytes_to_write=plan.bytes_to_write,
        bytes_to_fetch=to_fetch,
        resumed_bytes=resumed,
        free_bytes=free,
        elapsed_s=round(time.perf_counter() - job.began, 3),
        device=choice.device,
        device_why=choice.why,
        vocabulary=job.vocabulary,
        added_tokens=job.added_tokens,
        dropped_tokens=job.dropped_tokens,
        inexact=inexact,
        left_out=job.left_out,
        relations=job.relations,
        warnings=tuple(job.warnings),
        notes=(*job.notes, *remarks(job.fates)),
        requantized=tuple(job.requantized),
    )
