"""What a LoRA adapter of each rank keeps of the family's fine-tune, and what its graft scores.

`extract --as lora` makes an adapter of `finetuned` at several ranks, with the tensors that are no
matrices stored whole. Each is merged with base, and its Δ is grafted on target.

    $ python examples/adapter_ranks.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console
from rich.table import Table
from score_family import accuracy, bits_per_character, held_out
from transformers.utils import logging

from diffxfer import extract_diff, transfer, verify
from diffxfer.family import family_folder

RANKS = (4, 8, 16, 32)


def row(
    name: str, finetuned: Path, merged: Path, scratch: Path, size: int, error: str
) -> list[str]:
    """Graft a fine-tune on target, and score it before and after."""
    family = family_folder()
    graft = scratch / f"graft {name}"
    transfer(finetuned, family / "base", family / "target", graft)
    return [
        *(name, f"{size / 1e6:.2f} MB", error, f"{accuracy(merged):.1%}"),
        *(f"{accuracy(graft):.1%}", f"{bits_per_character(graft):.2f}"),
    ]


def main() -> None:
    """Print a table of ranks and scores."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    family = family_folder()
    full, base = family / "finetuned", family / "base"
    table = Table(caption="Fewer bits per character: it reads text of target's kind better.")
    table.add_column("rank", no_wrap=True)
    for heading in ("size", "‖error‖/‖Δ‖", "base + Δ:\nright", "graft:\nright", "graft:\nbits"):
        table.add_column(heading, justify="right")
    typer.echo(f"right: the share of {len(held_out())} unseen words", err=True)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        for rank in RANKS:
            adapter, merged = scratch / f"rank-{rank}", scratch / f"merged-{rank}"
            extract_diff(full, base, adapter, as_="lora", rank=rank)
            found = verify(adapter, base=base, finetuned=full).distances or ()
            squares = [sum(each.error_norm**2 for each in found)]
            squares.append(sum(each.delta_norm**2 for each in found))
            transfer(adapter, base, base, merged)
            size = (adapter / "adapter_model.safetensors").stat().st_size
            error = f"{(squares[0] / squares[1]) ** 0.5:.1%}"
            table.add_row(*row(str(rank), adapter, merged, scratch, size, error))
        size = (full / "model.safetensors").stat().st_size
        table.add_row(*row("full", full, full, scratch, size, "0.0%"))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
