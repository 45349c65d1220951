"""Train a LoRA adapter on the shipped family's base with PEFT, graft it on target, and score it.

The adapter learns what `finetuned` learned: to write words in Pig Latin. It is trained as
`train_family.py` trains, with the base's weights frozen. The shipped one was made by

    $ python examples/train_adapter.py diffxfer/family/adapter

With the folder of an adapter that exists, nothing is trained: it is grafted and scored.
"""

import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from score_family import accuracy, bits_per_character, held_out
from train_family import (
    BASE_CONTEXT,
    SEED,
    character_tokenizer,
    docstrings,
    load,
    package_docstrings,
    task_batches,
    task_words,
    text_batches,
    train,
)
from transformers.utils import logging

from diffxfer import apply_diff, transfer
from diffxfer.family import family_folder


def train_adapter(out: Path, rank: int, steps: int, learning_rate: float) -> None:
    """Train an adapter of all linear layers on base, and save it in bfloat16."""
    base_texts = docstrings(Path(sysconfig.get_path("stdlib")))
    target_texts = [
        text for name in ("torch", "transformers", "numpy") for text in package_docstrings(name)
    ]
    words, _ = task_words(base_texts, target_texts)
    tokenizer = character_tokenizer()
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(load(family_folder() / "base"), config)
    rehearsal = text_batches(base_texts, tokenizer, BASE_CONTEXT, tokens=2048)
    train(
        model,
        task_batches(words, tokenizer),
        rehearsal,
        steps=steps,
        learning_rate=learning_rate,
    )
    model.peft_config["default"].base_model_name_or_path = "base"
    model.bfloat16().save_pretrained(out)
    (out / "README.md").unlink()  # PEFT's card is a form that nobody has filled in


def compare(adapter: Path, scratch: Path) -> Table:
    """Graft the adapter and the full fine-tune on target; return what they score, as a table."""
    family = family_folder()
    merged, graft, full = (scratch / name for name in ("merged", "graft", "full"))
    apply_diff(adapter, family / "base", merged)
    apply_diff(adapter, family / "target", graft)
    transfer(family / "finetuned", family / "base", family / "target", full)
    table = Table(caption="Fewer bits per character: it reads text of target's kind better.")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column(f"right of {len(held_out())}\nunseen words", justify="right")
    table.add_column("bits per\ncharacter", justify="right")
    for name, folder in (
        ("base + adapter", merged),
        ("finetuned (all weights)", family / "finetuned"),
        ("target", family / "target"),
        ("target + adapter", graft),
        ("target + (finetuned − base)", full),
    ):
        table.add_row(name, f"{accuracy(folder):.1%}", f"{bits_per_character(folder):.2f}")
    return table


def main(
    out: Annotated[Path, typer.Argument(help="the adapter's folder")],
    rank: int = 8,
    steps: int = 500,
    learning_rate: float = 1e-2,
) -> None:
    """Train an adapter into OUT unless it exists, then graft and score it."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not out.exists():
        train_adapter(out, rank, steps, learning_rate)
    with TemporaryDirectory() as scratch:
        Console().print(compare(out, Path(scratch)))


if __name__ == "__main__":
    typer.run(main)
