"""The options of commands that write LoRA adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from diffxfer.cli.help import HOW, OUTPUT, WHAT

As = Annotated[
    str,
    typer.Option(
        "--as",
        rich_help_panel=OUTPUT,
        metavar="diff|lora",
        autocompletion=lambda: ["diff", "lora"],
        help="What to write: the diff vector, or a LoRA adapter for PEFT, which approximates it.",
    ),
]
ApplyAs = Annotated[
    str,
    typer.Option(
        "--as",
        rich_help_panel=OUTPUT,
        metavar="model|lora",
        autocompletion=lambda: ["model", "lora"],
        help="What to write: the whole model, or (lora) the adapter DIFF itself, made to fit"
        " TARGET.",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=HOW,
        metavar="N",
        help="With --as lora: the rank of every matrix; 32 by default.",
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=HOW,
        metavar="FLOAT",
        help="With --as lora: the share of each matrix's squared norm to keep, such as 0.95, by"
        " the smallest rank that keeps it.",
    ),
]
MaxRank = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=HOW,
        metavar="N",
        help="With --energy: the largest rank; 128 by default.",
    ),
]
Rest = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="modules_to_save|lora|drop",
        autocompletion=lambda: ["modules_to_save", "lora", "drop"],
        help="With --as lora: store embeddings, heads, norms and biases that changed whole, store"
        " factors of embeddings and heads only, or leave all of them out.",
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        rich_help_panel=HOW,
        help="With --as lora: compute the factors to the last digits, which takes longer.",
    ),
]
