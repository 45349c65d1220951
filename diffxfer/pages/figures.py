"""Figures of a page, drawn by plotly without its legends; the page has legends that wrap."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, NamedTuple

from diffxfer.errors import printable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Without the buttons that send data to a server.
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}
_MANY = 8
"""With more curves than this, hovering shows one name at a time; the box would hide the curves."""
_TEXTS = frozenset({"name", "text", "ticktext", "x", "y"})
"""The keys of a figure whose strings are texts, which plotly reads as markup."""


class LegendEntry(NamedTuple):
    """A line of a legend.

    Attributes:
        name: the name of a curve.
        colour: its colour.
        style: ``"solid"``, ``"dash"``, ``"dot"``, or ``"point"`` if it is points alone.
    """

    name: str
    colour: str
    style: str


def legend_entries(figure: Figure) -> list[LegendEntry]:
    """The legend of a figure: one entry for each curve that has a name.

    Args:
        figure: any figure; shaded intervals, bars and heat maps have no entries.
    """
    return [
        LegendEntry(
            line.name,
            line.line.color,
            "point" if line.mode == "markers" else line.line.dash or "solid",
        )
        for line in figure.data
        if line.type == "scatter" and line.showlegend is not False
    ]


def scale_meaning(figure: Figure) -> str:
    """What the colours of a heat map mean; empty for another figure.

    Args:
        figure: any figure.
    """
    return str((figure.layout.meta or {}).get("meaning", ""))


def figure_html(figure: Figure, *, number: int) -> str:
    """Render a figure as HTML, in the style of a page.

    Args:
        figure: of `charts`, or of lines that have names and colours.
        number: its number on the page, from 1; the first figure includes plotly's code.
    """
    from plotly.graph_objects import Figure

    figure = Figure(_as_text(figure.to_dict()))
    unified = 0 < len(legend_entries(figure)) <= _MANY
    unified = unified and not any(line.mode == "markers" for line in figure.data if _line(line))
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif"},
        height=figure.layout.height or 360,
        margin={"t": figure.layout.margin.t or 32, "r": 10, "l": 45, "b": 45},
        hovermode="x unified" if unified else "closest",
        showlegend=False,
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True, ticklabelstandoff=5)
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs="inline" if number == 1 else False,
            div_id=f"figure-{number}",  # plotly's own would be another each time
            config=_CONFIG,
        )
    )


def _line(trace: Any) -> bool:
    return bool(trace.type == "scatter")


def _as_text(value: Any, key: str = "") -> Any:
    """Escape the texts of a figure, in which plotly would find links and line breaks."""
    if isinstance(value, str):
        return html.escape(printable(value), quote=False) if key in _TEXTS else value
    if isinstance(value, dict):
        return {name: _as_text(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(inner, key) for inner in value]
    return value
