"""Options that several commands share, defined once."""

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
        help="The fine-tuned model or a LoRA adapter: a folder, or org/name[@revision] on the Hub.",
    ),
]
Base = Annotated[
    Path,
    typer.Argument(metavar="BASE", help="The base model that it was made from: a folder or an id."),
]
Target = Annotated[
    Path,
    typer.Argument(
        metavar="TARGET",
        help="The newer base model, or your own continued pre-training of BASE: a folder or an id.",
    ),
]
Diff = Annotated[
    Path,
    typer.Argument(
        metavar="DIFF",
        help="A diff vector, made by extract, or a LoRA adapter: a folder, or org/name[@revision].",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        rich_help_panel=OUTPUT,
        metavar=PATH,
        help="The output folder; it must not exist yet.",
    ),
]


def _one_number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a number; give one, such as 0.8 (diffxfer eval takes several)",
            param_hint="'--alpha'",
        ) from None


Alpha = Annotated[
    float,
    typer.Option(
        parser=_one_number,
        rich_help_panel=HOW,
        metavar="FLOAT",
        help="Scale of the difference: 1 adds all of it, 0.5 half, and 0 copies the target.",
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
        help="Use only tensors whose name matches one of these; repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Leave out tensors whose name matches, even if --include matches; repeatable.",
    ),
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="REGEX",
        help="Tensors that a model may lack: those that only the target has are copied, others"
        " are dropped; repeatable.",
    ),
]
Added = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="bring|drop|refuse",
        autocompletion=lambda: ["refuse", "bring", "drop"],
        help="What to do with a head that fine-tuning added, such as a classifier: copy it with its"
        " settings in the config, leave it out, or refuse.",
    ),
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="ROLE:REGEX=TEXT",
        help="Rename the tensors of finetuned, base or target before they pair, for example"
        r" 'finetuned:^backbone\.=model.'; repeatable, applied in order.",
    ),
]
Vocab = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="auto|ids|tokens",
        autocompletion=lambda: ["auto", "ids", "tokens"],
        help="How rows of embeddings pair: by id, by token string, or (auto) by id if the"
        " tokenizers agree and by token otherwise.",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        rich_help_panel=SAFETY,
        help="Accept NaN, infinity and overflow.",
    ),
]
AllowUnrelated = Annotated[
    bool,
    typer.Option(
        "--allow-unrelated",
        rich_help_panel=SAFETY,
        help="Accept models that share their shapes but seem unrelated.",
    ),
]
DiffDtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="source|float32|bfloat16|float16|float64",
        autocompletion=lambda: ["source", "float32", "bfloat16", "float16", "float64"],
        help="Dtype of the diff vector: source rounds to the fine-tune's own dtypes; float32 is"
        " twice as large for a 16-bit model, and nearly exact.",
    ),
]
Pack = Annotated[
    str | None,
    typer.Option(
        "--pack",
        rich_help_panel=OUTPUT,
        metavar="[exact|int8|int4]",
        help="Compress the diff vector. exact, also without a value: applied to the base, it gives"
        " the fine-tune back bit for bit. int8 and int4 round it, and are a half and a quarter as"
        " large as a 16-bit model, or less.",
    ),
]
PackLevel = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="1-19",
        help="How hard --pack compresses; 1 by default, and higher levels seldom gain anything.",
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
Requantize = Annotated[
    bool,
    typer.Option(
        "--requantize",
        rich_help_panel=OUTPUT,
        help="Write the target's quantised tensors in their own format, with new scales; by default"
        " they become bfloat16.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="SIZE",
        help="Largest shard, such as 5GB; by default the shards of the target (extract: of the"
        " fine-tune).",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="N",
        min=1,
        max=256,
        help="Number of threads; by default one per processor, at most 8.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="cpu|cuda|cuda:N|auto",
        autocompletion=lambda: ["cpu", "cuda", "auto"],
        help="Where the arithmetic runs; the result is the same. auto uses a GPU only if it could"
        " save more time than it takes to start, and says why.",
    ),
]
DeviceMemory = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="SIZE",
        help="The most memory to allocate on a GPU.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        rich_help_panel=SAFETY,
        help="Replace the output folder if diffxfer made it.",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        rich_help_panel=SAFETY,
        help="Discard the unfinished runs beside the output folder instead of continuing them.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel=SAFETY,
        help="Print the plan, tensor by tensor, and write nothing.",
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        rich_help_panel=WHERE,
        help="Read models directly from the Hub, and store only the output.",
    ),
]
StreamInputs = Annotated[
    bool,
    typer.Option(
        "--stream",
        rich_help_panel=WHERE,
        help="Read models directly from the Hub, and store nothing.",
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
    typer.Option("-q", "--quiet", rich_help_panel=OUTPUT, help="Print only warnings and errors."),
]
QuietTalk = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", rich_help_panel=OUTPUT, help="Print only the result, warnings and errors."
    ),
]


def parse_alpha_for(values: list[str] | None) -> dict[str, float]:
    """Parse ``REGEX=FLOAT`` options.

    Args:
        values: the options, in order.

    Returns:
        The scale of each pattern, in the order of each pattern's last occurrence.

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
        # The last of equal patterns wins, also in its position among the others.
        scales.pop(regex, None)
        scales[regex] = scale
    return scales


def parse_alphas(value: str | None) -> list[float] | None:
    """Parse comma-separated scales.

    Args:
        value: the option's value, None if it was not given.

    Raises:
        typer.BadParameter: if one is not a number.
    """
    if value is None:
        return None
    scales = [(part, _number(part)) for part in value.split(",")]
    for part, scale in scales:
        if scale is None:
            raise typer.BadParameter(
                f"{part!r} is not a number; give numbers such as 0.8,1.0,1.2", param_hint="--alpha"
            )
    return [scale for _, scale in scales if scale is not None]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
