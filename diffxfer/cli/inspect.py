"""`diffxfer inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli import options as opt
from diffxfer.cli.console import Console, print_json


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder of a checkpoint or of a diff vector.")
    ],
    json: opt.Json = False,
    quiet: opt.QuietTalk = False,
) -> None:
    """Say what a checkpoint or a diff vector is."""
    from diffxfer import inspect_checkpoint
    from diffxfer.cli.inspect_table import print_inspection

    with Console(json=json, quiet=quiet):
        found = inspect_checkpoint(path)
    if json:
        print_json(found.as_json())
    else:
        print_inspection(found)
