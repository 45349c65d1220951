"""The report of a chain as a self-contained HTML page with tables and plots.

The page is meant to be shared, so it has no local paths.
"""

from __future__ import annotations

import html
import re
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import printable
from diffxfer.recycling.atomic_write import write_atomically
from diffxfer.recycling.chain_plots import (
    STAGE_NAMES,
    figure_html,
    legend_entries,
    losses_figure,
    scores_figure,
)
from diffxfer.recycling.chain_report import format_value
from diffxfer.recycling.chain_summary import summarize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plotly.graph_objects import Figure

    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.chain_report import ChainReport

_ABSOLUTE = re.compile(
    r"(?<![\w.:/…~}-])(?:~[\w.-]*)?(?:/[^\s/'\"<>,;:()]+)+/([^\s/'\"<>,;:()]+)/?"
)
"""An absolute path in a text; the group is its last component."""

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
.legend i.dotted { border-top-style: dotted }
@media (max-width: 48rem) {
  table, tbody, tr, td, caption { display: block; text-align: left }
  tr:first-child { display: none }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line) }
  td, td:first-child { border: 0; padding: .1rem 0; min-width: 0; white-space: normal }
  td:first-child { font-weight: 600 } td:empty { display: none }
  td[data-column]::before { content: attr(data-column) ": "; color: var(--soft);
                            font-weight: normal }
}
/* plotly writes its colours beside each element. */
.js-plotly-plot .main-svg { background: transparent !important }
.js-plotly-plot .bg { fill: transparent !important }
.js-plotly-plot .xtick text, .js-plotly-plot .ytick text, .js-plotly-plot .xtitle,
.js-plotly-plot .ytitle { fill: var(--soft) !important }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path {
  stroke: var(--line) !important }
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
<div class="verdict">
{verdict}
</div>
<p>{summary}</p>
{body}
{warnings}<h2>Recipe</h2>
<pre>{recipe}</pre>
<p><small>diffxfer {version}</small></p>
</body>
</html>
"""


def write_page(report: ChainReport, path: Path, *, home: Path | None = None) -> None:
    """Write the page of a chain.

    Args:
        report: the result of the chain.
        path: the file to write, atomically.
        home: the folder of the recipe; paths in it are shown relative to it.

    Raises:
        OutputError: if the file cannot be written.
    """
    import yaml

    parts: list[str] = []
    for measure in report.measures:
        parts += [_section(report, measure)]
        parts += _drawn(scores_figure(report, measure), first=len(parts) == 1)
    losses = losses_figure(report)
    if losses is not None:
        parts += ["<h2>Training loss</h2>", *_drawn(losses, first=not parts)]
    bases = " → ".join(each.base for each in report.rounds)
    recipe = _map_texts(report.recipe, lambda text: without_folders(text, report.run, home))
    warnings = (without_folders(warning, report.run, home) for warning in report.warnings)
    page = _PAGE.format(
        style=_STYLE,
        title=escape(f"Chain of {len(report.rounds)} bases"),
        verdict=_summary_html(summarize(report)),
        summary=escape(f"{bases}; mode {report.recipe.get('mode', 'iter')}"),
        body="\n".join(parts),
        warnings=_warnings(warnings),
        recipe=escape(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
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


def without_folders(text: str, run: Path, home: Path | None) -> str:
    """Shorten local paths in a text.

    Args:
        text: any text with paths in it; a path outside of the two folders keeps its last component.
        run: the folder of the run; paths in it become relative to it.
        home: the folder of the recipe; paths in it become relative to it.
    """
    whole = Path(text)
    for folder in (run, home):
        if folder is not None and folder.is_absolute():
            text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
    if whole.is_absolute() and text == str(whole) and "\n" not in text:
        return f"…/{whole.name}"  # a path with spaces does not match the pattern
    for folder in (Path.home(), Path(gettempdir())):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}/", "…/")
    return _ABSOLUTE.sub(r"…/\1", text)


def _map_texts(value: Any, change: Any) -> Any:
    """Apply a function to every string in a nested value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    return [_map_texts(inner, change) for inner in value] if isinstance(value, list) else value


def _summary_html(lines: list[str]) -> str:
    first, *others = map(escape, lines)
    items = "".join(f"<li>{line}</li>\n" for line in others)
    return f"<p>{first}</p>" + (f"\n<ul>\n{items}</ul>" if others else "")


def _warnings(warnings: Iterator[str]) -> str:
    lines = "".join(f"<li>{escape(warning)}</li>\n" for warning in warnings)
    return f"<h2>Warnings</h2>\n<ul>\n{lines}</ul>\n" if lines else ""


def _section(report: ChainReport, measure: MetricKey) -> str:
    """The heading and table of one measure."""
    columns = report.columns()
    heads = "".join(f"<th>{escape(STAGE_NAMES[column])}</th>" for column in columns)
    lines = []
    for each in report.rounds:
        best = each.best(measure)
        cells = "".join(_cell(column, each.row(column, measure), best) for column in columns)
        alpha = "" if each.alpha is None else f" <small>alpha {each.alpha:g}</small>"
        lines.append(f"<tr><td>{each.number}. {escape(each.base)}{alpha}</td>{cells}</tr>")
    name = escape(title_of(measure))
    caption = _caption(report, measure)
    return (
        f"<h2>{name}</h2>\n<table>\n{caption}"
        f"<tr><th>round</th>{heads}</tr>\n" + "\n".join(lines) + "\n</table>"
    )


def _caption(report: ChainReport, measure: MetricKey) -> str:
    """The caption: whether higher is better, and the meaning of ±."""
    found = (each.row(column, measure) for each in report.rounds for column in report.columns())
    rows = [row for row in found if row is not None]
    said = []
    if rows and rows[0]["higher_is_better"] is not None:
        said.append("higher is better" if rows[0]["higher_is_better"] else "lower is better")
    if any(row["stderr"] is not None for row in rows):
        said.append("± standard error")
    return f"<caption>{'; '.join(said)}</caption>\n" if said else ""


def _cell(column: str, row: dict[str, Any] | None, best: float | None) -> str:
    if row is None:
        return "<td></td>"
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    mark = ' class="best"' if best is not None and row["value"] == best else ""
    name = escape(STAGE_NAMES[column])
    return f'<td{mark} data-column="{name}">{format_value(row)}<small>{stderr}</small></td>'


def title_of(measure: MetricKey) -> str:
    """The title of a measure.

    Args:
        measure: task, metric and filter.
    """
    task, metric, chosen = measure
    return f"{task}: {metric}" + ("" if chosen == "none" else f" ({chosen})")


def _drawn(figure: Figure, *, first: bool) -> list[str]:
    """A figure below its legend."""
    entries = "".join(
        f'<li><i style="border-color:{colour}"{" class=dotted" if dotted else ""}></i>'
        f"{escape(name)}</li>"
        for name, colour, dotted in legend_entries(figure)
    )
    return [f'<ul class="legend">{entries}</ul>', figure_html(figure, first=first)]
