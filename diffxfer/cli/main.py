"""The `diffxfer` command: its commands, and the one place where errors become text."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli.apply import apply
from diffxfer.cli.console import as_known, print_error, print_interrupted
from diffxfer.cli.demo import demo
from diffxfer.cli.eval import eval_models
from diffxfer.cli.extract import extract
from diffxfer.cli.inspect import inspect
from diffxfer.cli.iterate import iterate
from diffxfer.cli.push import push
from diffxfer.cli.transfer import transfer
from diffxfer.cli.tune import tune
from diffxfer.cli.verify import verify
from diffxfer.errors import OptionError

app = typer.Typer(
    name="diffxfer",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# \b keeps the lines after it as they are, so that a command can be copied whole.
_EXAMPLE = "Example:\n\n\b\n  diffxfer "
_TRANSFER = "transfer llama-3.0-sft llama-3.0 llama-3.1 -o llama-3.1-grafted"
_EVAL = "eval llama-3.1 --finetuned llama-3.1-sft --diff sft-diff --alpha 0.8,1.0 --tasks gsm8k"
_TUNE = "tune llama-3.1-grafted --data train.jsonl -o llama-3.1-tuned --steps 200"

app.command(epilog=f"{_EXAMPLE}extract llama-3.0-sft llama-3.0 -o sft-diff")(extract)
app.command(epilog=f"{_EXAMPLE}apply sft-diff llama-3.1 -o llama-3.1-grafted --alpha 0.8")(apply)
app.command(epilog=f"{_EXAMPLE}{_TRANSFER}")(transfer)
app.command(epilog=f"{_EXAMPLE}inspect sft-diff")(inspect)
app.command(epilog=f"{_EXAMPLE}verify sft-diff")(verify)
app.command("eval", epilog=f"{_EXAMPLE}{_EVAL}")(eval_models)
app.command(epilog=f"{_EXAMPLE}demo --keep demo")(demo)
app.command(epilog=f"{_EXAMPLE}{_TUNE}")(tune)
app.command(epilog=f"{_EXAMPLE}iterate chain.yaml -o run")(iterate)
app.command(epilog=f"{_EXAMPLE}push sft-diff me/llama-sft-diff --private")(push)


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
    """Move what fine-tuning did to a base model onto its successor, before any training."""
    del version


def main() -> None:
    """Run the command line; errors of a known cause end in one line.

    Exit status: 0 if it worked, 1 if it could not be done, 2 if the command line makes no sense,
    130 after Ctrl-C, 143 after SIGTERM.
    """
    # Python looks for garbage after 700 new objects, and now and then through all of them: of
    # 60,000 tensors, that was a third of a command's time. There are next to no cycles to find.
    gc.set_threshold(100_000, 10, 10)
    # A shell may close them: `>&-`. Python has None there, which nothing can print to, and the
    # next file that is opened would get their numbers.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 open to the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 open to the end
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no letter for α gets its code, instead of a traceback.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        app(prog_name="diffxfer")
    except KeyboardInterrupt as exc:
        sys.exit(print_interrupted(exc))
    except Exception as exc:
        known = as_known(exc)
        if known is None or os.environ.get("DIFFXFER_DEBUG") == "1":
            raise
        print_error(known)
        sys.exit(2 if isinstance(known, OptionError) else 1)
    finally:
        # Python ends by looking for garbage among all that torch is made of: half a second.
        gc.freeze()
