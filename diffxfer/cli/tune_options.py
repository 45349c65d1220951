"""The options of tune alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli.help import DISTILLATION, EITHER, SAFETY, TRAINING, WHAT

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="The model to train, for example a graft: a folder, or org/name[@revision].",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar=EITHER,
        help="Rows with messages, prompt and completion, or text; for a classifier text and label,"
        " or text, text_pair and label: a .jsonl, .json or .parquet file, or the id of a data set"
        " on the Hub (its train split).",
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="NAME",
        help="What to predict: causal (the next token), classification (the label of a row) or mlm"
        " (masked tokens). By default what MODEL predicts; the label, if the rows of a masked"
        " language model or a bare encoder have one.",
    ),
]
Steps = Annotated[
    int,
    typer.Option(rich_help_panel=TRAINING, metavar="N", min=1, help="Number of optimizer steps."),
]
LearningRate = Annotated[
    float,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="FLOAT",
        help="AdamW's learning rate after the warm-up; it falls linearly to zero.",
    ),
]
Warmup = Annotated[
    float,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="FLOAT",
        help="Steps in which the learning rate rises linearly from zero; below 1, a share of all"
        " steps.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(rich_help_panel=TRAINING, metavar="N", min=1, help="Rows per process and batch."),
]
GradientAccumulation = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="N",
        min=1,
        help="Batches per step, for larger steps in the same memory.",
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        rich_help_panel=TRAINING,
        help="Compute activations twice to save memory.",
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="TOKENS",
        min=2,
        help="Cut rows that are longer, with a warning; at most the model's context.",
    ),
]
EndToken = Annotated[
    bool,
    typer.Option(
        "--end-token/--no-end-token",
        rich_help_panel=TRAINING,
        help="End each text and completion with the end-of-text token, and count it in the loss.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="N",
        min=0,
        help="Seed for the order of rows, dropout, masks, and a new classification head.",
    ),
]
Teacher = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar=EITHER,
        help="Also learn from this model, for example the outdated fine-tune; it must have the same"
        " vocabulary, and a classifier the same labels.",
    ),
]
DistillWeight = Annotated[
    float,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar="FLOAT",
        help="Weight of the teacher against the rows, 0 to 1.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar="FLOAT",
        help="Divides the logits that are compared; higher values weigh unlikely tokens more.",
    ),
]
HiddenWeight = Annotated[
    float,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar="FLOAT",
        help="Weight of the difference of hidden states; 0 ignores it.",
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SAFETY,
        metavar="N",
        min=1,
        help="Steps between saved states, from which an interrupted run continues; by default a"
        " tenth of all, at least 50.",
    ),
]
