"""The options of probe alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli.help import EITHER, WHAT

Finetuned = Annotated[
    Path,
    typer.Argument(
        metavar="FINETUNED",
        help="The fine-tuned model, or a LoRA adapter: a folder, or org/name[@revision].",
    ),
]
Direct = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar=EITHER,
        help="The target's own fine-tune, or an adapter of the target, to compare what fine-tuning"
        " did to base with what it did to the target.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Measure only tensors whose name matches one of these; repeatable.",
    ),
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Tensors that a model may lack: they are left out; repeatable.",
    ),
]
Added = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="bring|drop|refuse",
        autocompletion=lambda: ["refuse", "bring", "drop"],
        help="What the graft would do with a head that fine-tuning added: it is not measured, or"
        " (refuse) an error.",
    ),
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="ROLE:REGEX=TEXT",
        help="Rename the tensors of finetuned, base, target or direct before they pair, for example"
        r" 'finetuned:^backbone\.=model.'; repeatable, applied in order.",
    ),
]
