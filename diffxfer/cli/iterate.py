"""`diffxfer iterate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli import options as opt
from diffxfer.cli.cluster import GpusPerModel, Ray, cluster_of
from diffxfer.cli.help import OUTPUT, PATH, WHAT


def iterate(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="A YAML or JSON file with bases, training and scoring."
        ),
    ],
    run: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            rich_help_panel=OUTPUT,
            metavar=PATH,
            help="Folder for rounds, state and report; created, or continued.",
        ),
    ],
    from_round: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar="N",
            min=1,
            help="Repeat round N and all later ones with the current recipe.",
        ),
    ] = None,
    ray: Ray = None,
    gpus_per_model: GpusPerModel = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Follow a recipe over a chain of bases: graft, tune, score."""
    from diffxfer import iterate as iterate_chain
    from diffxfer.cli.chain_console import ChainConsole

    console = ChainConsole(json=json, quiet=quiet)
    with console, cluster_of(ray, console) as cluster:
        report = iterate_chain(
            recipe,
            run,
            from_round=from_round,
            progress=console.say,
            moved=console.progress,
            training=console.training,
            answered=console.answered,
            stage=console.stage,
            opened=console.opened,
            cluster=cluster,
            gpus_per_model=gpus_per_model,
        )
        console.show_chain(report)
