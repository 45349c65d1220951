"""A self-contained HTML page: its document, its style, and the escaping of everything in it."""

from __future__ import annotations

import html
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from diffxfer.checkpoints.atomic_write import write_atomically
from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import printable
from diffxfer.pages.figures import figure_html, legend_entries, scale_meaning

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from plotly.graph_objects import Figure

_STYLE = """\
:root { color-scheme: light dark; --ink: #222; --soft: #5c5c5c; --line: #ddd; --ground: #fff;
        --panel: #f4f4f4; --accent: #2b85c7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --line: #3a3d42; --ground: #16181c; --panel: #212429;
          --accent: #5aa9e0 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--ground); overflow-wrap: anywhere }
h1, h2 { line-height: 1.25 }
h2 { margin-top: 2.5rem }
.verdict { border-left: .25rem solid var(--accent); background: var(--panel);
           padding: .6rem 1rem; margin: 1rem 0 }
.verdict p { margin: .3rem 0; font-size: 1.1rem }
.verdict ul { margin: .3rem 0; padding-left: 1.2rem }
.verdict li { color: var(--soft) }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
         vertical-align: top }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:first-child { white-space: normal; min-width: 8rem }
td.best { font-weight: bold } td small { font-weight: normal }
small, caption, .legend { color: var(--soft) }
caption { text-align: left; padding-bottom: .4rem }
pre { background: var(--panel); padding: 1rem; white-space: pre-wrap }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0;
          margin: 0 0 .5rem; font-size: .9rem }
.legend i { display: inline-block; width: 1.4rem; margin-right: .4rem; vertical-align: middle;
            border-top: 3px solid }
.legend i.dot { border-top-style: dotted }
.legend i.dash { border-top-style: dashed }
.legend i.point { width: .6rem; border-top-width: .6rem; border-radius: .3rem }
.scale { text-align: center; font-size: .9rem; color: var(--soft); margin: 0 }
.meaning { color: var(--soft); margin: .3rem 0 2rem; max-width: 46rem }
.meaning b { color: var(--ink); font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem }
dt { color: var(--soft) } dd { margin: 0 }
.grid { overflow-x: auto; margin: 1rem 0 }
.grid table { margin: 0 }
.grid th, .grid td { padding: .2rem .5rem; font-variant-numeric: tabular-nums; min-width: 0;
                     white-space: nowrap }
.grid th:first-child, .grid td:first-child { position: sticky; left: 0; padding-left: 0;
                                             background: var(--ground) }
@media (max-width: 48rem) {
  .rows, .rows tbody, .rows tr, .rows td, .rows caption { display: block; text-align: left }
  .rows tr:first-child { display: none }
  .rows tr { padding: .5rem 0; border-bottom: 1px solid var(--line) }
  .rows td, .rows td:first-child { border: 0; padding: .1rem 0; min-width: 0; white-space: normal }
  .rows td:first-child { font-weight: 600 } .rows td:empty { display: none }
  .rows td[data-column]::before { content: attr(data-column) ": "; color: var(--soft);
                                  font-weight: normal }
  dl { display: block } dd { margin-bottom: .5rem }
}
/* plotly writes its colours beside each element. */
.js-plotly-plot .main-svg { background: transparent !important }
.js-plotly-plot .bg { fill: transparent !important }
.js-plotly-plot .xtick text, .js-plotly-plot .ytick text, .js-plotly-plot .xtitle,
.js-plotly-plot .ytitle, .js-plotly-plot .colorbar text { fill: var(--soft) !important }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path {
  stroke: var(--line) !important }
.js-plotly-plot .bars .errorbar path { stroke: var(--ink) !important }
.js-plotly-plot .hoverlayer .legend .bg { fill: var(--panel) !important;
                                          stroke: var(--line) !important }
.js-plotly-plot .hoverlayer .legend text { fill: var(--ink) !important }
.js-plotly-plot .modebar, .js-plotly-plot .modebar-group { background: transparent !important }
.js-plotly-plot .modebar-btn path { fill: var(--soft) !important }
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<p><small>diffxfer {version}</small></p>
</body>
</html>
"""


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: its text; a cell without text is not shown on a narrow screen.
        small: a smaller text behind it.
        best: whether it is the best of its row.
    """

    text: str
    small: str = ""
    best: bool = False


class Page:
    """A page, built from top to bottom. Its methods take plain text, and escape it.

    Args:
        title: the title, also shown as the first heading.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._figures = 0

    def verdict(self, lines: Sequence[str]) -> None:
        """Add a box with the most important statement, and others below it.

        Args:
            lines: the statements, at least one.
        """
        first = f"<p>{escape(lines[0])}</p>"
        others = f"\n{_bullets(lines[1:])}" if lines[1:] else ""
        self._parts.append(f'<div class="verdict">\n{first}{others}\n</div>')

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def bullets(self, lines: Iterable[str]) -> None:
        """Add a list."""
        self._parts.append(_bullets(lines))

    def preformatted(self, text: str) -> None:
        """Add a text whose line breaks and spaces are kept, such as a file."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Add a list of names, each with its value beside it.

        Args:
            facts: names and values.
        """
        lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts)
        self._parts.append(f"<dl>\n{lines}</dl>")

    def table(
        self,
        heads: Sequence[str],
        rows: Iterable[Sequence[Cell]],
        caption: str,
        *,
        grid: bool = False,
    ) -> None:
        """Add a table; on a narrow screen each row is a block.

        Args:
            heads: the heads of the columns.
            rows: a cell for each column; the first one is the row's name.
            caption: a line above it; none if empty.
            grid: whether it is a grid of short numbers, which is scrolled on a narrow screen.
        """
        above = f"<caption>{escape(caption)}</caption>\n" if caption else ""
        head = "".join(f"<th>{escape(head)}</th>" for head in heads)
        lines = "".join(_row(heads, row) for row in rows)
        kind = "" if grid else ' class="rows"'
        table = f"<table{kind}>\n{above}<tr>{head}</tr>\n{lines}</table>"
        self._parts.append(f'<div class="grid">{table}</div>' if grid else table)

    def figure(self, figure: Figure) -> None:
        """Add a figure below its legend.

        Args:
            figure: made by a function of `charts`, or of lines that have names and colours; its
                style is set here.
        """
        entries = "".join(
            f'<li><i style="border-color:{colour}"{_classed(style)}></i>{escape(name)}</li>'
            for name, colour, style in legend_entries(figure)
        )
        if entries:
            self._parts.append(f'<ul class="legend">{entries}</ul>')
        meaning = scale_meaning(figure)
        if meaning:
            self._parts.append(f'<p class="scale">colour: {escape(meaning)}</p>')
        self._figures += 1
        self._parts.append(figure_html(figure, number=self._figures))

    def explain(self, text: str) -> None:
        """Say below a figure or a table what it means, to a reader who knows no papers.

        Args:
            text: a sentence or two.
        """
        self._parts.append(f'<p class="meaning"><b>What this means:</b> {escape(text)}</p>')

    def write(self, path: Path) -> None:
        """Write the page.

        Args:
            path: the file to write, atomically.

        Raises:
            OutputError: if the file cannot be written.
        """
        page = _PAGE.format(
            title=escape(self._title),
            style=_STYLE,
            body="\n".join(self._parts),
            version=version("diffxfer"),
        )
        try:
            write_atomically(path, page.encode())
        except OSError as exc:
            raise write_error(path.parent, path.name, exc) from exc


def escape(text: str) -> str:
    """Escape markup and control characters, such as those that change the text direction.

    Args:
        text: any text; its line breaks are kept.
    """
    return "\n".join(html.escape(printable(line)) for line in text.split("\n"))


def _classed(style: str) -> str:
    return "" if style == "solid" else f" class={style}"


def _bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<ul>\n{items}</ul>"


def _row(heads: Sequence[str], row: Sequence[Cell]) -> str:
    first, *others = row
    cells = [f"<td>{_inside(first)}</td>"]
    for head, cell in zip(heads[1:], others, strict=True):
        mark = ' class="best"' if cell.best else ""
        name = f' data-column="{escape(head)}"' if cell.text else ""
        cells.append(f"<td{mark}{name}>{_inside(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>\n"


def _inside(cell: Cell) -> str:
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return escape(cell.text) + small
