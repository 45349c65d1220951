"""A chain as one page of HTML: its table and its curves, with nothing to fetch from anywhere."""

from __future__ import annotations

import html
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.writer import write_error
from diffxfer.errors import printable
from diffxfer.recycling.chain_report import COLUMNS, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from plotly.graph_objects import Figure

    from diffxfer.recycling.chain_report import ChainReport, Measure, Round

# Colours that the colour-blind tell apart (Okabe and Ito 2008), one for each column.
_COLOURS = {"base": "#999999", "graft": "#E69F00", "tuned": "#0072B2", "direct": "#009E73"}
_NAMES = {
    "base": "base alone",
    "graft": "graft",
    "tuned": "graft, tuned",
    "direct": "base, tuned plainly",
}

# No button that sends anything anywhere.
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }}
div.wide {{ overflow-x: auto; margin: 1rem 0 2rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
td:first-child {{ white-space: normal; overflow-wrap: anywhere; min-width: 8rem }}
td.best {{ font-weight: bold }} td small {{ font-weight: normal }}
small, caption {{ color: #666 }}
caption {{ text-align: left; padding-bottom: .4rem }}
p, li {{ overflow-wrap: anywhere }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{body}
{warnings}<h2>Recipe</h2>
<pre>{recipe}</pre>
<p><small>diffxfer {version}</small></p>
</body>
</html>
"""


def write_page(report: ChainReport, path: Path) -> None:
    """Write the page of a chain.

    Args:
        report: what it came to.
        path: the file to write, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    import yaml

    parts: list[str] = []
    for measure in report.measures:
        parts += [_section(report, measure), _embed(_scores(report, measure), first=not parts)]
    losses = _losses(report)
    if losses is not None:
        parts += ["<h2>Training loss</h2>", _embed(losses, first=not parts)]
    bases = " → ".join(each.base for each in report.rounds)
    page = _PAGE.format(
        title=escape(f"Chain of {len(report.rounds)} bases"),
        summary=escape(f"{bases}; mode {report.recipe.get('mode', 'iter')}"),
        body="\n".join(parts),
        warnings=_warnings(report),
        recipe=escape(yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)),
        version=version("diffxfer"),
    )
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(page, "utf-8")
        partial.replace(path)
    except OSError as exc:
        raise write_error(path.parent, path.name, exc) from exc


def escape(text: str) -> str:
    """Text as a page may have it: neither markup, nor what turns or hides the text around it.

    Args:
        text: any text; its lines stay.
    """
    return "\n".join(html.escape(printable(line)) for line in text.split("\n"))


def _warnings(report: ChainReport) -> str:
    lines = "".join(f"<li>{escape(warning)}</li>\n" for warning in report.warnings)
    return f"<h2>Warnings</h2>\n<ul>\n{lines}</ul>\n" if lines else ""


def _section(report: ChainReport, measure: Measure) -> str:
    """The table of one measure."""
    columns = report.columns()
    heads = "".join(f"<th>{escape(_NAMES[column])}</th>" for column in columns)
    lines = []
    for each in report.rounds:
        rows = {column: each.row(column, measure) for column in columns}
        best = each.best(measure)
        cells = "".join(_cell(rows[column], best) for column in columns)
        alpha = "" if each.alpha is None else f" <small>alpha {each.alpha:g}</small>"
        lines.append(f"<tr><td>{each.number}. {escape(each.base)}{alpha}</td>{cells}</tr>")
    name = escape(title_of(measure))
    caption = _caption(report, measure)
    return (
        f'<h2>{name}</h2>\n<div class="wide"><table>\n{caption}'
        f"<tr><th>round</th>{heads}</tr>\n" + "\n".join(lines) + "\n</table></div>"
    )


def _caption(report: ChainReport, measure: Measure) -> str:
    """Which way is better, and what stands behind ±."""
    found = (each.row(column, measure) for each in report.rounds for column in report.columns())
    rows = [row for row in found if row is not None]
    said = []
    if rows and rows[0]["higher_is_better"] is not None:
        said.append("higher is better" if rows[0]["higher_is_better"] else "lower is better")
    if any(row["stderr"] is not None for row in rows):
        said.append("± standard error")
    return f"<caption>{'; '.join(said)}</caption>\n" if said else ""


def _cell(row: dict[str, Any] | None, best: float | None) -> str:
    if row is None:
        return "<td></td>"
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    mark = ' class="best"' if best is not None and row["value"] == best else ""
    return f"<td{mark}>{value_of(row)}<small>{stderr}</small></td>"


def title_of(measure: Measure) -> str:
    """A measure as a person would say it.

    Args:
        measure: task, metric and filter.
    """
    task, metric, chosen = measure
    return f"{task}: {metric}" + ("" if chosen == "none" else f" ({chosen})")


def _scores(report: ChainReport, measure: Measure) -> Figure:
    """Rounds against score, a curve for each column, with standard errors."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for column in COLUMNS:
        found = [(each, each.row(column, measure)) for each in report.rounds]
        there = [(each, row) for each, row in found if row is not None]
        if there:
            figure.add_trace(
                Scatter(
                    x=[each.number for each, _ in there],
                    y=[row["value"] for _, row in there],
                    error_y={"type": "data", "array": [row["stderr"] or 0 for _, row in there]},
                    mode="lines+markers",
                    name=_NAMES[column],
                    line={"color": _COLOURS[column]},
                )
            )
    figure.update_xaxes(dtick=1, title="round")
    figure.update_yaxes(title=escape(measure[1]))  # plotly reads some HTML in its texts
    return _styled(figure)


def _losses(report: ChainReport) -> Figure | None:
    """Training steps against loss, a curve for each round and model; None without training."""
    from plotly.colors import sample_colorscale
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    last = max(1, len(report.rounds) - 1)
    for place, each in enumerate(report.rounds):
        colour = sample_colorscale("Plasma", [0.85 * place / last])[0]
        for name, log in each.losses.items():
            if log:
                figure.add_trace(
                    Scatter(
                        x=[entry["step"] for entry in log],
                        y=[entry["loss"] for entry in log],
                        mode="lines",
                        name=f"{each.number}: {_trained(name, each)}",
                        line={"color": colour, "dash": "dot" if name == "direct" else "solid"},
                    )
                )
    if not figure.data:
        return None
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss")
    return _styled(figure)


def _trained(name: str, each: Round) -> str:
    plainly = name == "direct" or each.alpha is None
    return _NAMES["direct" if plainly else "tuned"]


def _styled(figure: Figure) -> Figure:
    figure.update_layout(
        template="plotly_white",
        height=400 + 10 * len(figure.data),
        margin={"t": 20, "r": 20, "l": 60},
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        showlegend=True,
    )
    return figure


def _embed(figure: Figure, *, first: bool) -> str:
    """A figure as HTML; the first one brings the code that draws them all."""
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs="inline" if first else False,
            config=_CONFIG,
        )
    )
