"""Graft Pig Latin on the shipped family's successor; see what it learns and what it keeps.

$ python examples/graft_family.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from score_family import accuracy, bits_per_character, held_out
from transformers.utils import logging

from diffxfer import transfer
from diffxfer.family import family_folder


def compare(graft: Path) -> Table:
    """Transfer the fine-tuning into `graft`; return what it and its kin score, as a table."""
    family = family_folder()
    transfer(family / "finetuned", family / "base", family / "target", graft, alpha=1.0)
    table = Table(
        title="Base's fine-tuning, grafted on its successor",
        caption="Fewer bits per character: it reads text of the successor's kind better.",
    )
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("training on\nthe task")
    table.add_column(f"right of {len(held_out())}\nunseen words", justify="right")
    table.add_column("bits per\ncharacter", justify="right")
    for name, training, folder in (
        ("base", "none", family / "base"),
        ("target: base's successor", "none", family / "target"),
        ("graft: target + finetuned − base", "none", graft),
        ("direct: target, fine-tuned", "yes", family / "direct"),
    ):
        table.add_row(
            name, training, f"{accuracy(folder):.1%}", f"{bits_per_character(folder):.2f}"
        )
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
