"""Write the reference: every option of every command, from the commands' own help.

$ python examples/reference/make_reference.py

A test compares that page with what this script would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffxfer.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffxfer.cli.help import GroupedCommand

PAGE = Path(__file__).with_name("README.md")

_HEAD = """\
# Reference: every option of every command

`python examples/reference/make_reference.py` writes this page from the commands' own help.

- *Models.* `PATH|ID` is a folder, or `org/name[@revision]` on the Hub. `PATH` is a local file or
  folder.
- *Patterns.* A REGEX may match anywhere in a tensor's name. It matches the target's names in
  `apply` and `transfer`, and the fine-tune's in `extract`.
- *Streams.* The plan of `--dry-run` and the object of `--json` go to stdout: counts, bytes,
  seconds, output and warnings, or the error. Progress (on a terminal), a summary and warnings go
  to stderr.
- *Exit status.* 0 for success, 1 for a failure that is explained in one line, 2 for wrong usage,
  130 after Ctrl-C, 143 after SIGTERM. `DIFFXFER_DEBUG=1` shows the traceback of an error.
- *Completion.* `diffxfer --install-completion` completes commands, options and paths in bash, zsh
  and fish; `--show-completion` prints the script. `diffxfer --version` prints the version.
"""


def reference() -> str:
    """The page."""
    group: Any = typer.main.get_command(app)
    home = typer.Context(group, **group.context_settings)
    parts = (section(name, command, home) for name, command in sorted(group.commands.items()))
    return "\n".join((_HEAD, *parts))


def section(name: str, command: GroupedCommand, home: Any) -> str:
    """What a command does, an example, and its arguments and options.

    Args:
        name: of the command.
        command: as it is registered.
        home: click's context of all commands.
    """
    context = typer.Context(command, info_name=name, parent=home)
    example = str(command.epilog).splitlines()[-1].strip()
    lines = [
        f"## {name}",
        "",
        str(command.help),
        "",
        f"```console\n{example}\n```",
        "",
        "| | | meaning |",
        "|---|---|---|",
        *rows(command, context),
        "",
    ]
    return "\n".join(lines)


def rows(command: GroupedCommand, context: Any) -> Iterator[str]:
    """A row for each argument and option, in the groups of the help.

    Args:
        command: which.
        context: click's.
    """
    for group, entries in command.grouped(context).items():
        for number, (name, meaning) in enumerate(entries):
            shown = meaning.replace("|", r"\|").replace("  [", " [").replace("*", r"\*")
            yield f"| {group if not number else ''} | `{escaped(name)}` | {shown} |"


def escaped(name: str) -> str:
    """A name as code within a table, where even there a bar would end the cell."""
    return name.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
