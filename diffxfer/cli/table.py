"""What the tables on stdout share: the console, the columns and the cells.

Names come from untrusted files, so every text is made printable and none is read as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffxfer.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_PIPE_WIDTH = 10_000
"""The width of lines without a terminal, so that they are not folded."""


def stdout() -> Console:
    """The console for tables; output to a pipe or file is not folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def folded(text: str, style: str = "") -> Text:
    """A text in a table or on a line of its own; it is folded if it is too long.

    Args:
        text: any text, with names from untrusted files.
        style: of rich, such as ``bold``.
    """
    from rich.text import Text

    return Text(printable(text), style, overflow="fold")


def make_table(
    *,
    title: str = "",
    header: bool = True,
    padding: tuple[int, int, int, int] = (0, 1, 0, 1),
) -> Table:
    """An empty table without lines, whose heads are bold.

    Args:
        title: printed above it, at the left.
        header: whether the heads are shown.
        padding: columns and lines around each cell: top, right, bottom, left.
    """
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=padding,
        show_header=header,
    )


def add_columns(table: Table, *heads: str, numbers: bool = False, no_wrap: bool = False) -> None:
    """Add columns to a table.

    Args:
        table: the table.
        heads: their heads.
        numbers: whether they have numbers, which are aligned at the right.
        no_wrap: whether their cells stay on one line.
    """
    for head in heads:
        table.add_column(head, justify="right" if numbers else "left", no_wrap=no_wrap)


def print_head(text: str, out: Console) -> None:
    """Print a heading.

    Args:
        text: the heading.
        out: the console.
    """
    out.print(folded(text, "bold"))


def print_facts(facts: Iterable[tuple[str, str]], out: Console) -> None:
    """Print names and values in two columns.

    Args:
        facts: name and value, one line each; long lines are folded.
        out: the console.
    """
    from rich.text import Text

    table = make_table(header=False, padding=(0, 2, 0, 0))
    add_columns(table, "", no_wrap=True)
    add_columns(table, "")
    for name, text in facts:
        table.add_row(Text(printable(name), "dim"), folded(text))
    out.print(table)
