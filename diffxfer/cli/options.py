"""Options that more than one command has, defined once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli.help import (
    HOW,
    OUTPUT,
    PATH,
    SAFETY,
    WHAT,
    WHERE,
)

Finetuned = Annotated[
    Path,
    typer.Argument(
        metavar="FINETUNED",
        help="The fine-tuned model: a folder, or org/name[@revision] on the Hub.",
    ),
]
Base = Annotated[
    Path, typer.Argument(metavar="BASE", help="The base model it was made from, likewise.")
]
Target = Annotated[
    Path,
    typer.Argument(
        metavar="TARGET",
        help="The newer base model to graft on, or your own continued pre-training of BASE,"
        " likewise.",
    ),
]
Diff = Annotated[
    Path,
    typer.Argument(
        metavar="DIFF", help="A diff vector, made by extract: a folder, or org/name[@revision]."
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        rich_help_panel=OUTPUT,
        metavar=PATH,
        help="Folder to make; it must not exist yet.",
    ),
]

Alpha = Annotated[
    float,
    typer.Option(
        rich_help_panel=HOW,
        metavar="FLOAT",
        help="How strongly to graft: 1 adds the whole difference, 0.5 half of it, 0 none.",
    ),
]
AlphaFor = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=HOW,
        metavar="REGEX=FLOAT",
        help="Another alpha for tensors whose name matches; repeatable, the last match wins.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Only tensors whose name matches take part; repeatable, any match will do.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Tensors whose name matches take no part, whatever --include says; repeatable.",
    ),
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Tensors that one model may lack: what only the target has is copied, what only"
        " another has is dropped; repeatable.",
    ),
]
Added = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="bring|drop|refuse",
        autocompletion=lambda: ["refuse", "bring", "drop"],
        help="What to do with a head that fine-tuning added, such as a classifier: bring it whole,"
        " with what the config says of it, drop it, or refuse.",
    ),
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="ROLE:REGEX=TEXT",
        help="Pair the tensors of a role (finetuned, base or target) by other names, such as"
        r" 'finetuned:^backbone\.=model.'; repeatable, in this order.",
    ),
]
Vocab = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="auto|ids|tokens",
        autocompletion=lambda: ["auto", "ids", "tokens"],
        help="How the rows of embeddings pair up: by id, by token string, or by ids where"
        " the tokenizers agree and by tokens where they do not (auto).",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        rich_help_panel=SAFETY,
        help="Let NaN, infinity and overflow through instead of refusing them.",
    ),
]
AllowUnrelated = Annotated[
    bool,
    typer.Option(
        "--allow-unrelated",
        rich_help_panel=SAFETY,
        help="Go on where two models have the same shapes and nothing else in common.",
    ),
]
DiffDtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="source|float32|bfloat16|float16|float64",
        autocompletion=lambda: ["source", "float32", "bfloat16", "float16", "float64"],
        help="What the diff vector is stored in: source rounds it to finetuned's own dtypes;"
        " float32 is twice as large for a 16-bit model, and nearly exact.",
    ),
]
OutDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="float32|bfloat16|float16|float64",
        autocompletion=lambda: ["float32", "bfloat16", "float16", "float64"],
        help="Dtype of the output; by default the target's, tensor by tensor.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="SIZE",
        help="Cut shards at this size, such as 5GB; by default where the input's are cut.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="N",
        min=1,
        max=256,
        help="Threads; by default one a processor, 8 at most.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="cpu|cuda|cuda:N|auto",
        autocompletion=lambda: ["cpu", "cuda", "auto"],
        help="Where the arithmetic runs, to the same bits; auto takes a GPU only where it could"
        " save more than it takes to start, and says why.",
    ),
]
DeviceMemory = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="SIZE",
        help="The most that is allocated on a GPU, whatever the model.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        rich_help_panel=SAFETY,
        help="Replace the output folder if it exists and diffxfer made it.",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        rich_help_panel=SAFETY,
        help="Discard what unfinished runs left beside the output folder, instead of going on"
        " from it.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel=SAFETY,
        help="Print what would be done, tensor by tensor; write nothing.",
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        rich_help_panel=WHERE,
        help="Read models on the Hub straight from there, and store nothing but the output.",
    ),
]
StreamInputs = Annotated[
    bool,
    typer.Option(
        "--stream",
        rich_help_panel=WHERE,
        help="Read what is on the Hub straight from there, and store nothing.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        rich_help_panel=OUTPUT,
        help="Print the result, or the error, as one JSON object on stdout.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", rich_help_panel=OUTPUT, help="Print nothing but warnings and errors."
    ),
]
QuietTalk = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", rich_help_panel=OUTPUT, help="Print no talk, only the result and errors."
    ),
]


def parse_alpha_for(values: list[str] | None) -> dict[str, float]:
    """Read ``REGEX=FLOAT`` options.

    Args:
        values: what was given, in order.

    Returns:
        The scale of each pattern, in the order in which the last of each was given.

    Raises:
        typer.BadParameter: if one is not of that form.
    """
    scales: dict[str, float] = {}
    for value in values or []:
        regex, _, number = value.rpartition("=")
        scale = _number(number)
        if not regex or scale is None:
            raise typer.BadParameter(
                f"{value!r} is not of the form REGEX=FLOAT, such as 'lm_head=0.5'",
                param_hint="--alpha-for",
            )
        # The last of two equal patterns wins, and takes its place among the others.
        scales.pop(regex, None)
        scales[regex] = scale
    return scales


def parse_alphas(value: str | None) -> list[float] | None:
    """Read scales that are separated by commas.

    Args:
        value: what was given, None for nothing.

    Raises:
        typer.BadParameter: if one is no number.
    """
    if value is None:
        return None
    scales = [(part, _number(part)) for part in value.split(",")]
    for part, scale in scales:
        if scale is None:
            raise typer.BadParameter(
                f"{part!r} is no number, as in 0.8,1.0,1.2", param_hint="--alpha"
            )
    return [scale for _, scale in scales if scale is not None]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
