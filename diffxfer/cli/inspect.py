"""`diffxfer inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli import options as opt
from diffxfer.cli.cluster import Ray, cluster_of
from diffxfer.cli.console import Console, print_json
from diffxfer.cli.help import EITHER, OUTPUT, PATH
from diffxfer.cli.hub import tell_of_hub
from diffxfer.errors import OptionError


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar=EITHER, help="A checkpoint or a diff vector: a folder, or org/name[@revision]."
        ),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="A second one, to show how the two differ."),
    ] = None,
    threads: opt.Threads = None,
    ray: Ray = None,
    stream: opt.StreamInputs = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            rich_help_panel=OUTPUT,
            metavar=PATH,
            help="Folder for report.html, a page with heat maps, and report.json, its data.",
        ),
    ] = None,
    json: opt.Json = False,
    quiet: opt.QuietTalk = False,
) -> None:
    """Describe a checkpoint or diff vector, or compare two."""
    from diffxfer import compare_checkpoints, inspect_checkpoint
    from diffxfer.cli.compare_table import print_comparison
    from diffxfer.cli.inspect_table import print_inspection

    _refuse_useless(ray, other)
    console = Console(json=json, quiet=quiet)
    with console, cluster_of(ray, console) as cluster:
        tell_of_hub(console.say, path, other)
        if other is None:
            found = inspect_checkpoint(path, output=output)
        else:
            pair = compare_checkpoints(
                path,
                other,
                threads=threads,
                stream=stream,
                output=output,
                progress=console.progress,
                cluster=cluster,
            )
            console.say(f"read {gigabytes(pair.bytes_read)} in {pair.elapsed_s:.1f} s")
        if output is not None:
            console.say(f"the page is {output / 'report.html'}")
    if json:
        print_json(found.as_json() if other is None else pair.as_json())
    elif other is None:
        print_inspection(found)
    else:
        print_comparison(pair)


def _refuse_useless(ray: str | None, other: object) -> None:
    if ray is not None and other is None:
        remedy = "omit it, or give OTHER to compare with"
        raise OptionError("--ray", "has no effect on one folder", remedy)
