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
    if report.unpacked_bytes is not None:
        return "no difference gives them back, such as −0.0 from 1.0"
    wider = "a wider --diff-dtype, such as float32, gives back more"
    elements = report.parameters.get("extracted", 0)
    # A 16-bit model: an exact difference of float32 models may be larger than a rounded one.
    smaller = " and takes less space" if report.bytes_to_write < 3 * elements else ""
    return f"{wider}, and --pack is exact{smaller}"
