"""Options that more than one command has, defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Finetuned = Annotated[
    Path, typer.Argument(metavar="FINETUNED", help="Folder of the fine-tuned model.")
]
Base = Annotated[
    Path, typer.Argument(metavar="BASE", help="Folder of the base model it was made from.")
]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="Folder of the newer base model to graft on.")
]
Diff = Annotated[
    Path, typer.Argument(metavar="DIFF", help="Folder of a diff vector, made by extract.")
]
Out = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to make.", show_default=False)
]

_GRAFT, _ROWS, _RUN = "What is grafted", "Rows and numbers", "Output and run"

Alpha = Annotated[float, typer.Option(help="Scale of the diff vector.", rich_help_panel=_GRAFT)]
AlphaFor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'REGEX=FLOAT'",
        help="Another scale for tensors whose name matches; repeatable, the last match wins.",
        rich_help_panel=_GRAFT,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Take part: only tensors whose name matches; repeatable.",
        rich_help_panel=_GRAFT,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Leave out tensors whose name matches, whatever --include says; repeatable.",
        rich_help_panel=_GRAFT,
    ),
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Tensors that a model may lack: the target's are copied, others dropped; repeatable.",
        rich_help_panel=_GRAFT,
    ),
]
Vocab = Annotated[
    str,
    typer.Option(
        metavar="auto|ids|tokens",
        help="How rows of tokens pair: by position, by token string, or whichever is right.",
        rich_help_panel=_ROWS,
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        help="Let NaN, infinity and overflow through instead of refusing them.",
        rich_help_panel=_ROWS,
    ),
]
DiffDtype = Annotated[
    str,
    typer.Option(
        metavar="source|float32|bfloat16|float16|float64",
        help="What the diff vector is stored in; source is finetuned's own dtype, rounded once.",
        rich_help_panel=_ROWS,
    ),
]
OutDtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16|float64",
        help="Dtype of the output; by default the target's, tensor by tensor.",
        rich_help_panel=_ROWS,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Cut shards at this size, such as 5GB; by default as the input's are cut.",
        rich_help_panel=_RUN,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=256, help="Threads; by default one a processor, 8 at most.", rich_help_panel=_RUN
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT if diffxfer made it.", rich_help_panel=_RUN),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan, from headers alone, and write nothing.",
        rich_help_panel=_RUN,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_RUN),
]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Print nothing but errors.", rich_help_panel=_RUN),
]


def parse_alpha_for(values: list[str] | None) -> dict[str, float]:
    """Read ``REGEX=FLOAT`` options.

    Raises:
        typer.BadParameter: if one is not of that form.
    """
    scales: dict[str, float] = {}
    for value in values or []:
        regex, separator, number = value.rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            separator = ""
            scale = 0.0
        if not separator or not regex:
            raise typer.BadParameter(f"{value!r} is not of the form 'REGEX=FLOAT'")
        # The last of two equal patterns wins, and takes its place among the others.
        scales.pop(regex, None)
        scales[regex] = scale
    return scales
