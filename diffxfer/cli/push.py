"""`diffxfer push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli import options as opt
from diffxfer.cli.help import PATH, SAFETY, WHAT, WHERE

_License = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="ID",
        help="The licence in the model card, such as apache-2.0; by default that of the target's"
        " card.",
    ),
]


def push(
    path: Annotated[
        Path,
        typer.Argument(
            metavar=PATH,
            help="A folder that diffxfer wrote: a diff vector, a graft or a tuned model.",
        ),
    ],
    repo_id: Annotated[
        str,
        typer.Argument(
            metavar="org/name", help="The repository on the Hub; created if it does not exist."
        ),
    ],
    private: Annotated[
        bool,
        typer.Option("--private", rich_help_panel=WHERE, help="Create the repository as private."),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(
            "-m", "--message", rich_help_panel=WHAT, metavar="TEXT", help="The commit message."
        ),
    ] = None,
    eval: Annotated[  # noqa: A002 the command's own word
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar=PATH,
            help="A folder that eval --output wrote; this model's scores go into the model card.",
        ),
    ] = None,
    license: _License = None,  # noqa: A002 as the Hub calls it
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=SAFETY,
            help="Print the files and the model card, and upload nothing.",
        ),
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Publish what diffxfer wrote on the Hub, with a model card."""
    from diffxfer import push as publish
    from diffxfer.cli.push_console import PushConsole

    with PushConsole(json=json, quiet=quiet) as console:
        report = publish(
            path,
            repo_id,
            private=private,
            message=message,
            eval=eval,
            license=license,
            dry_run=dry_run,
            progress=console.watched,
        )
        console.show_pushed(report)
