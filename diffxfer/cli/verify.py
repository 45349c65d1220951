"""`diffxfer verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli import options as opt
from diffxfer.cli.adapter_table import print_distances
from diffxfer.cli.cluster import Ray, cluster_of
from diffxfer.cli.console import Console, print_json
from diffxfer.cli.help import EITHER, WHAT
from diffxfer.cli.hub import tell_of_hub
from diffxfer.diffs.artifact.distances import in_words
from diffxfer.errors import DamageError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diffxfer.diffs.artifact.distances import Distance
    from diffxfer.diffs.verification.restore import Restored
    from diffxfer.diffs.verification.verify import VerifyReport


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar=EITHER,
            help="A diff vector, a graft, an adapter or a tuned model: a folder, or"
            " org/name[@revision].",
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar=EITHER,
            help="The base of a diff vector, to prove that base + diff vector is the fine-tune; or"
            " of a lossy one or an adapter, to measure how far base + its Δ is from the fine-tune.",
        ),
    ] = None,
    finetuned: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar=EITHER,
            help="The fine-tune that it was extracted from.",
        ),
    ] = None,
    rename: opt.Rename = None,
    threads: opt.Threads = None,
    ray: Ray = None,
    stream: opt.StreamInputs = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check everything that diffxfer wrote, and name what is damaged."""
    from diffxfer import verify as verify_folder

    try:
        console = Console(json=json, quiet=quiet)
        with console, cluster_of(ray, console) as cluster:
            tell_of_hub(console.say, path, base, finetuned)
            report = verify_folder(
                path,
                base=base,
                finetuned=finetuned,
                rename=rename or (),
                threads=threads,
                stream=stream,
                progress=console.progress,
                cluster=cluster,
            )
    except DamageError as exc:
        if not (json or quiet):
            _print_lines(str(damage) for damage in exc.damage)
        raise
    if json:
        print_json(report.as_json())
    elif not quiet:
        _print_lines(_summary(report))
        print_distances(report.distances)


def _print_lines(lines: Iterable[str]) -> None:
    """Print results on stdout."""
    for line in lines:
        typer.echo(printable(line))


def _summary(report: VerifyReport) -> list[str]:
    if report.distances is not None and not report.files:
        return [f"{report.path} has no manifest of ours: only its distance was measured"]
    lines = [
        f"{report.path} is as it was written: tensors {report.tensors:,}, shards"
        f" {report.shards:,}, other files {report.files:,} ({gigabytes(report.bytes_read)} in"
        f" {report.elapsed_s:.1f} s)"
    ]
    if report.lossy is not None and report.distances:
        lines.append(_lossy(report.lossy, report.distances, measured=report.restored is not None))
    elif report.restored is not None:
        lines += _restored(report.restored)
    if report.restored is not None and report.restored.unpaired:
        rows = f"{report.restored.unpaired:,} elements in rows that belong to no token of base"
        lines.append(f"not compared: {rows}")
    return lines


def _lossy(form: str, distances: Sequence[Distance], *, measured: bool) -> str:
    """How far base + Δ of a lossy diff vector is from the fine-tune."""
    whence = "" if measured else ", as its manifest records it"
    return f"lossy ({form}): base + Δ is near finetuned{whence}: {in_words(distances)}"


def _restored(restored: Restored) -> list[str]:
    every = f"{restored.elements:,}"
    lines = [f"base + Δ gives finetuned back bit for bit, all {every} elements"]
    if restored.inexact:
        total = sum(restored.inexact.values())
        lines = [
            f"base + Δ gives finetuned back bit for bit except for {total:,} of {every} elements,"
            " as its manifest says:",
            *(f"  {name}: {count:,}" for name, count in restored.inexact.items()),
        ]
    return lines
