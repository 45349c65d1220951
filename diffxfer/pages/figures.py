"""Figures of a page, drawn by plotly without its legends; the page has legends that wrap."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def legend_entries(figure: Figure) -> list[tuple[str, str, bool]]:
    """The name and colour of each curve, and whether it is dotted.

    Args:
        figure: of lines that have names and colours.
    """
    return [(line.name, line.line.color, line.line.dash == "dot") for line in figure.data]


def figure_html(figure: Figure, *, first: bool) -> str:
    """Render a figure as HTML, in the style of a page.

    Args:
        figure: of lines that have names and colours.
        first: whether to include plotly's code, which the first figure of a page needs.
    """
    figure.update_layout(
        template="plotly_white",
        height=360,
        margin={"t": 32, "r": 10, "l": 45, "b": 45},
        hovermode="x unified" if len(figure.data) <= _MANY else "closest",
        showlegend=False,
    )
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs="inline" if first else False,
            config=_CONFIG,
        )
    )
