"""The options that only tune has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli.help import DISTILLATION, EITHER, SAFETY, TRAINING, WHAT

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="The model to begin with, a graft or any: a folder, or org/name[@revision].",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar=EITHER,
        help="Rows with messages, prompt and completion, or text: a .jsonl, .json or .parquet"
        " file, or the id of a data set on the Hub, whose train split is read.",
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING, metavar="N", min=1, help="How many times the optimizer steps."
    ),
]
LearningRate = Annotated[
    float,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="FLOAT",
        help="AdamW's at the first step; it falls linearly to zero.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING, metavar="N", min=1, help="Rows that a process takes at a time."
    ),
]
GradientAccumulation = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="N",
        min=1,
        help="Batches a step: larger steps in the same memory.",
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        rich_help_panel=TRAINING,
        help="Save memory by computing activations a second time.",
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="TOKENS",
        min=2,
        help="Cut rows that are longer; a cut is told of.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        rich_help_panel=TRAINING, metavar="N", min=0, help="Of the order of rows and of dropout."
    ),
]
Teacher = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar=EITHER,
        help="Learn from this model too, which has the same vocabulary: the outdated"
        " fine-tuned one.",
    ),
]
DistillWeight = Annotated[
    float,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar="FLOAT",
        help="How much the teacher counts against the rows, 0 to 1.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar="FLOAT",
        help="Divides the logits that are compared; more looks at less likely words.",
    ),
]
HiddenWeight = Annotated[
    float,
    typer.Option(
        rich_help_panel=DISTILLATION,
        metavar="FLOAT",
        help="How much the difference of hidden states counts beside; 0 is none.",
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SAFETY,
        metavar="N",
        min=1,
        help="Steps from one state to continue from to the next; by default a tenth of all,"
        " 50 at least.",
    ),
]
