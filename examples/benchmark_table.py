"""What the benchmark found, as Markdown: the figures, and what they are held against."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

VERBS = ("extract", "apply", "transfer", "inspect")


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The figures as lines of Markdown."""
    head = "| family | command | seconds | peak memory | loop, s | GB/s | floor, s | loop ÷ floor |"
    gpu = any("bus" in row for rows in results.values() for row in rows.values())
    yield f"{head} bus, s | loop ÷ larger |" if gpu else head
    yield "|---|---|---|---|---|---|---|---|" + ("---|---|" if gpu else "")
    for shape, rows in results.items():
        for name, row in rows.items():
            walls = row["runs"]["wall"]
            cells = [
                f"{row['wall']:.2f} ({min(walls):.2f} to {max(walls):.2f})",
                f"{row['peak']:.0f} MiB",
                *(f"{row[key]}" if key in row else "" for key in ("loop", "gb_per_s")),
                *(f"{row[key]}" if key in row else "" for key in ("floor", "loop_to_floor")),
                *(f"{row.get(key, '')}" for key in (("bus", "loop_to_bound") if gpu else ())),
            ]
            yield f"| {shape} | {name} | {' | '.join(cells)} |"


def notes(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What the figures are held against, a line each."""
    for shape, rows in results.items():
        for name, row in rows.items():
            whole = f"{shape} {name}: {row['wall'] / row['tensors'] * 1e6:.0f} µs a tensor in all"
            if "loop" in row:
                by_cpu = f"loop ÷ floor by processor time {row['cpu_to_floor']}"
                yield f"{whole}, {row['us_per_tensor']} in the loop; {by_cpu}"
        if "mergekit" in rows:
            pairs = zip(
                rows["mergekit"]["runs"]["wall"], rows["transfer"]["runs"]["wall"], strict=True
            )
            times = median(theirs / ours for theirs, ours in pairs)
            yield f"{shape}: mergekit takes {times:.1f} times as long as transfer"
    for verb in VERBS:
        paces = [
            rows[verb]["s_per_gb"] for rows in results.values() if "loop" in rows.get(verb, {})
        ]
        if len(paces) > 1:
            apart = max(paces) / min(paces) - 1
            yield f"{verb}: {min(paces)} to {max(paces)} s a GB, {apart:.0%} apart"
