"""The `diffxfer` command: its commands, and the one place where errors become text."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from diffxfer.cli.apply import apply
from diffxfer.cli.console import print_error
from diffxfer.cli.extract import extract
from diffxfer.cli.transfer import transfer
from diffxfer.errors import DiffxferError

_INTERRUPTED = 130

app = typer.Typer(
    name="diffxfer",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extract)
app.command()(apply)
app.command()(transfer)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"diffxfer {version('diffxfer')}")
        raise typer.Exit


@app.callback()
def diffxfer(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Move what fine-tuning did to a base model onto its successor, without training.

    Start with: diffxfer transfer FINETUNED BASE TARGET -o OUT
    """
    del version


def main() -> None:
    """Run the command line; errors of a known cause end in one line and exit status 1."""
    try:
        app()
    except DiffxferError as exc:
        if os.environ.get("DIFFXFER_DEBUG") == "1":
            raise
        print_error(exc)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        sys.exit(_INTERRUPTED)
