"""How exact a diff vector is, and how small."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.diffs.artifact.distances import in_words

if TYPE_CHECKING:
    from diffxfer.diffs.jobs.report import Report


def exactness(report: Report) -> list[str]:
    """How exact and how small the diff vector of a report is, one line each.

    Args:
        report: of any verb; only `extract` has such lines.
    """
    lines = []
    if report.inexact:
        total = sum(report.inexact.values())
        every = report.parameters.get("extracted", total)
        lines.append(
            f"inexact: base + diff vector does not give back {total:,} of finetuned's {every:,}"
            f" elements bit for bit; {_remedy(report)}"
        )
    elif _packs_well(report):
        lines.append(f"size: {_smaller(report)}")
    plain = report.unpacked_bytes
    if plain and report.written:
        lines.append(
            f"packed: {gigabytes(report.bytes_to_write)}, {report.bytes_to_write / plain:.0%} of a"
            f" plain diff vector in finetuned's dtypes ({gigabytes(plain)})"
        )
    if report.lossy:
        lines.append(f"lossy: {in_words(report.lossy)}")
    return lines


def _remedy(report: Report) -> str:
    """What gives more elements back."""
    wider = "a wider --diff-dtype, such as float32, gives back more"
    return f"{wider}; {_smaller(report)}" if _packs_well(report) else f"{wider}, and --pack all"


def _packs_well(report: Report) -> bool:
    """Whether the diff vector is plain, and would be smaller if it were packed."""
    estimate = report.packed_estimate
    return report.written and estimate is not None and estimate < report.bytes_to_write


def _smaller(report: Report) -> str:
    estimate = report.packed_estimate or 0
    share = f"{estimate / report.bytes_to_write:.0%} of this size"
    return f"--pack would be exact, and take at most {gigabytes(estimate)} ({share})"
