"""The `diffxfer` command and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from diffxfer.cli.apply import apply
from diffxfer.cli.demo import demo
from diffxfer.cli.eval import eval_models
from diffxfer.cli.extract import extract
from diffxfer.cli.help import GroupedCommand
from diffxfer.cli.inspect import inspect
from diffxfer.cli.iterate import iterate
from diffxfer.cli.probe import probe
from diffxfer.cli.push import push
from diffxfer.cli.transfer import transfer
from diffxfer.cli.tune import tune
from diffxfer.cli.verify import verify

app = typer.Typer(
    name="diffxfer",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# \b keeps the following lines unwrapped, so that a command can be copied whole.
_EXAMPLE = "Example:\n\n\b\n  diffxfer "
_TRANSFER = "transfer llama-3.0-sft llama-3.0 llama-3.1 -o llama-3.1-grafted"
_EVAL = "eval llama-3.1 --finetuned llama-3.1-sft --diff sft-diff --alpha 0.8,1.0 --tasks gsm8k"
_TUNE = "tune llama-3.1-grafted --data train.jsonl -o llama-3.1-tuned --steps 200"

for _name, _function, _example in (
    ("extract", extract, "extract llama-3.0-sft llama-3.0 -o sft-diff"),
    ("apply", apply, "apply sft-diff llama-3.1 -o llama-3.1-grafted --alpha 0.8"),
    ("transfer", transfer, _TRANSFER),
    ("inspect", inspect, "inspect sft-diff"),
    ("probe", probe, "probe llama-3.0-sft llama-3.0 llama-3.1"),
    ("verify", verify, "verify sft-diff"),
    ("eval", eval_models, _EVAL),
    ("demo", demo, "demo --keep demo"),
    ("tune", tune, _TUNE),
    ("iterate", iterate, "iterate chain.yaml -o run"),
    ("push", push, "push sft-diff me/llama-sft-diff --private"),
):
    app.command(_name, cls=GroupedCommand, epilog=f"{_EXAMPLE}{_example}")(_function)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"diffxfer {version('diffxfer')}")
        raise typer.Exit


@app.callback(epilog=f"See it work first:\n\n\b\n  diffxfer demo\n\n{_EXAMPLE}{_TRANSFER}")
def diffxfer(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Move a fine-tune to the successor of its base model, without training."""
    del version
