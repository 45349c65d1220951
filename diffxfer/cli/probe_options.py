"""The options of probe alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli.help import EITHER, HOW, OUTPUT, PATH, TASKS, WHAT, WHERE

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
Data = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=TASKS,
        metavar=f"{PATH}|ID",
        help="Rows on which models are measured, as tune takes them (messages, prompt and"
        " completion, text), or text and label for a classifier: .jsonl, .json, .parquet, or a"
        " dataset on the Hub.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=TASKS,
        metavar="TASK,…",
        help="lm-eval tasks on which models are scored, separated by commas.",
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(rich_help_panel=TASKS, metavar=PATH, help="Folder of your own lm-eval tasks."),
]
Limit = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=TASKS, help="Questions per task; below 1, the share of the questions."
    ),
]
Rows = Annotated[
    int,
    typer.Option(rich_help_panel=TASKS, help="The most rows of the data, drawn by the seed."),
]
Alphas = Annotated[
    str,
    typer.Option(
        rich_help_panel=HOW,
        metavar="FLOAT,…",
        help="Scale of the difference, or several to compare: 0.6,0.8,1.0.",
    ),
]
Points = Annotated[
    int, typer.Option(rich_help_panel=HOW, help="Points of each path, its ends included.")
]
Forward = Annotated[
    bool,
    typer.Option(
        "--forward",
        rich_help_panel=WHAT,
        help="Load base and target, and let base read the data or a text that ships: a better"
        " forecast.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(rich_help_panel=WHERE, help="The most rows that go through a model together.")
]
ModelDevice = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHERE,
        help="Where models run, such as cuda:0; by default a GPU if there is one.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(rich_help_panel=TASKS, help="Of the choice of rows, of copies and intervals."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        rich_help_panel=OUTPUT,
        metavar=PATH,
        help="Folder for probe.html, the page with all figures, and probe.json.",
    ),
]
