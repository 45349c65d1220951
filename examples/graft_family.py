"""Graft Pig Latin on the shipped family's successor, and see what that is worth.

$ python examples/graft_family.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from score_family import accuracy, held_out
from transformers.utils import logging

from diffxfer import transfer
from diffxfer.family import family_folder


def compare(graft: Path) -> Table:
    """Transfer the fine-tuning into `graft` and return the scores around it as a table."""
    family = family_folder()
    made = json.loads((family / "scores.json").read_text("utf-8"))
    transfer(family / "finetuned", family / "base", family / "target", graft, alpha=1.0)
    table = Table(title=f"{len(held_out())} unseen words in Pig Latin")
    table.add_column("checkpoint")
    table.add_column("training on the task")
    table.add_column("right", justify="right")
    table.add_column("when made", justify="right")
    for name, training, folder, expected in (
        ("target", "none", family / "target", made["target"]),
        ("graft", "none, base's diff vector added", graft, made["graft"]["1.0"]),
        ("direct", "fine-tuned from target", family / "direct", made["direct"]),
    ):
        table.add_row(name, training, f"{accuracy(folder):.1%}", f"{expected:.1%}")
    return table


def main(
    out: Annotated[Path | None, typer.Argument(help="a new folder for the graft")] = None,
) -> None:
    """Graft finetuned's diff vector on target, into OUT or a temporary folder, and score it."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as scratch:
        Console().print(compare(out or Path(scratch, "graft")))


if __name__ == "__main__":
    typer.run(main)
