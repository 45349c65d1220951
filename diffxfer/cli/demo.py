"""`diffxfer demo`: all steps on the model family that ships with the package."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.cli.console import Console
from diffxfer.cli.help import OUTPUT, PATH
from diffxfer.errors import OutputExistsError, printable

if TYPE_CHECKING:
    from diffxfer import Evaluation, Report

_ALPHAS = (0.8, 1.0, 1.2)
_TASKS = ("pig_latin", "docstrings")
_BAR = 24

_STORY = """\
Four tiny Llamas, trained on real text on a CPU, come with diffxfer:

   base ─────── fine-tuning ──────▶ finetuned   writes Pig Latin: string → ingstray
     │
   more training
     ▼
   target ───── fine-tuning ──────▶ direct      what we would have to train again

Can target get finetuned's skill without training?

   graft = target + alpha · (finetuned − base)
"""
_YOURS = """\
On your own models:

  diffxfer extract YOUR-FINETUNE OLD-BASE -o diff
  diffxfer apply diff NEW-BASE -o grafted --alpha 1.0
  diffxfer eval NEW-BASE --diff diff --alpha 0.8,1.0,1.2 --tasks gsm8k,ifeval -o scores

or in one pass, without keeping the diff vector:

  diffxfer transfer YOUR-FINETUNE OLD-BASE NEW-BASE -o grafted
"""


def demo(
    keep: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=OUTPUT,
            metavar=PATH,
            help="A new folder to keep the diff vector, the graft and the scores in.",
        ),
    ] = None,
) -> None:
    """Show all of it on four tiny models, offline, on a CPU."""
    from diffxfer.checkpoints.output_place import refuse_unsafe_output
    from diffxfer.family import family_folder

    if keep is not None:
        _refuse_existing(keep)
        refuse_unsafe_output(keep, [family_folder()], overwrite=False)
    # The kept folder appears whole or not at all: it is moved to its place at the end.
    home = None if keep is None else keep.absolute().parent
    # Without a terminal, the text on stdout says everything.
    quiet = not sys.stderr.isatty()
    with Console(json=False, quiet=quiet) as console, scratch_folder(home) as work:
        _tell(family_folder(), work, console)
        if keep is not None:
            shutil.copytree(work, keep)
            typer.echo(f"Everything is in {printable(str(keep))}: diff/, grafted/ and scores/.")


def _refuse_existing(keep: Path) -> None:
    if os.path.lexists(keep):
        raise OutputExistsError(keep, "exists already", "choose another folder for --keep")


def _tell(family: Path, work: Path, console: Console) -> None:
    from diffxfer import apply_diff, extract_diff

    typer.echo(_STORY)
    typer.echo(f"The commands below are run in turn, with F={shlex.quote(str(family))}\n")
    command = "extract $F/finetuned $F/base -o diff"
    _step(1, "subtract: what did fine-tuning change?", command)
    _show_norms(extract_diff(family / "finetuned", family / "base", work / "diff"), work / "diff")
    _step(2, "graft it on base's successor", "apply diff $F/target -o grafted --alpha 1.0")
    _show_graft(apply_diff(work / "diff", family / "target", work / "grafted"))
    command = (
        "eval $F/target --finetuned $F/direct --diff diff --alpha 0.8,1.0,1.2 \\\n"
        "       --tasks pig_latin,docstrings --include-path $F/tasks \\\n"
        "       --batch-size 64 --device cpu --dtype float32 -o scores"
    )
    _step(3, "did it work, by how much, and is it more than noise?", command)
    typer.echo("")
    _show_scores(_score(family, work, console))
    typer.echo(f"\n{_YOURS}")


def _step(number: int, title: str, command: str) -> None:
    typer.echo(f"{number}. {title}\n   $ diffxfer {command}")
    sys.stdout.flush()


def _show_norms(report: Report, diff: Path) -> None:
    """The diff vector's size by kind of tensor, as bars."""
    from diffxfer.diffs.inspection.describe import norms_by_kind

    kinds = norms_by_kind(diff)
    most = max(measure.ratio for measure in kinds.values())
    typer.echo(f"   ‖Δ‖/‖base‖ of {sum(report.tensors.values())} tensors, by kind:")
    for kind, measure in kinds.items():
        name = _named(kind, measure.tensors)
        typer.echo(f"   {name:<44} {measure.ratio:6.1%}  {_bar(measure.ratio / most)}")
    typer.echo("")


def _named(kind: str, tensors: int) -> str:
    name = kind.removeprefix("model.").removesuffix(".weight")
    return f"{name} × {tensors}" if "*" in name else name


def _bar(share: float) -> str:
    return "█" * max(1, round(_BAR * share))


def _show_graft(report: Report) -> None:
    counts = ", ".join(f"{count} {kind}" for kind, count in report.tensors.items())
    typer.echo(f"   tensors: {counts}; a checkpoint like any other\n")


def _score(family: Path, work: Path, console: Console) -> Evaluation:
    """Score target, three grafts and the directly fine-tuned target."""
    with console.logged("step 3/3, scoring"):
        import torch

        from diffxfer import evaluate

        # Models this small are slower on several threads, much slower on a busy machine.
        torch.set_num_threads(1)
        return evaluate(
            family / "target",
            diff=work / "diff",
            alpha=_ALPHAS,
            finetuned=family / "direct",
            tasks=_TASKS,
            include_path=family / "tasks",
            batch_size=64,
            device="cpu",
            dtype="float32",
            output=work / "scores",
            answered=console.answered,
        )


def _show_scores(evaluation: Evaluation) -> None:
    from diffxfer.cli.score_table import print_scores

    best = evaluation.best
    if best is not None:
        command = f"diffxfer apply diff $F/target -o grafted --alpha {best.alpha}"
        best = replace(best, command=command)
    print_scores(replace(evaluation, best=best))
