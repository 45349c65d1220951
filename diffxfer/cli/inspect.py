"""`diffxfer inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli import options as opt
from diffxfer.cli.console import Console, gigabytes, print_json


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder of a checkpoint or of a diff vector.")
    ],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="A second one: say how the two differ."),
    ] = None,
    threads: opt.Threads = None,
    json: opt.Json = False,
    quiet: opt.QuietTalk = False,
) -> None:
    """Say what a checkpoint or diff vector is, or how two differ."""
    from diffxfer import compare_checkpoints, inspect_checkpoint
    from diffxfer.cli.compare_table import print_comparison
    from diffxfer.cli.inspect_table import print_inspection

    with Console(json=json, quiet=quiet) as console:
        if other is None:
            found = inspect_checkpoint(path)
        else:
            pair = compare_checkpoints(path, other, threads=threads, progress=console.progress)
            console.say(f"read {gigabytes(pair.bytes_read)} in {pair.elapsed_s:.1f} s")
    if json:
        print_json(found.as_json() if other is None else pair.as_json())
    elif other is None:
        print_inspection(found)
    else:
        print_comparison(pair)
