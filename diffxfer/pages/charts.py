"""The figures that pages have: curves, points, bars and heat maps.

The colours can be told apart by colour-blind readers, on white and on black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plotly.graph_objects import Figure, Scatter

    Values: TypeAlias = Sequence[float | None]

# After Okabe and Ito 2008.
PALETTE = ("#2B85C7", "#D98E00", "#009E73", "#CC79A7", "#8A8A8A", "#C8553D")
"""The colours of curves and bars that name none, in this order."""
# Viridis without its darkest end, which a dark page hides.
_SCALE = ("#414487", "#355F8D", "#2A788E", "#21918C", "#22A884", "#44BF70", "#7AD151", "#FDE725")

# Above the figure, where a narrow screen has room for it.
_SCALE_BAR = {
    "orientation": "h",
    "x": 0.5,
    "xanchor": "center",
    "y": 1.0,
    "yanchor": "bottom",
    "thickness": 10,
    "len": 1.0,
    "outlinewidth": 0,
    "nticks": 6,
}

_DASHES = {"line": "solid", "dashed": "dash", "dotted": "dot", "points": "solid"}
_LONGEST_NAME = 26
_MOST_LABELS = 24
"""A heat map with more rows or columns labels every second, fifth or tenth of them."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve, or a set of points.

    Attributes:
        name: its name in the legend.
        x: where its points are.
        y: their values; None leaves a gap.
        style: ``"line"``, with its points; ``"dashed"`` for a control, or ``"dotted"``, without
            them; ``"points"`` for points alone.
        colour: ``"#RRGGBB"``; empty for the next colour of the palette.
        low: the lower end of an interval at each point, which is shaded; None for no interval. With
            the style ``"points"``, intervals are drawn as bars.
        high: the upper end.
        labels: the text that hovering over each point shows before its value.
    """

    name: str
    x: Sequence[float]
    y: Values
    style: Literal["line", "dashed", "dotted", "points"] = "line"
    colour: str = ""
    low: Values | None = None
    high: Values | None = None
    labels: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar.

    Attributes:
        name: its label.
        value: its length.
        low: the lower end of an interval around it; None for no interval.
        high: the upper end.
        colour: ``"#RRGGBB"``; empty for the first colour of the palette.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = ""


def curves(drawn: Sequence[Curve], *, x: str, y: str) -> Figure:
    """Draw curves and points over one axis.

    Args:
        drawn: the curves; later ones are drawn over earlier ones.
        x: what the horizontal axis shows, with its unit.
        y: what the vertical axis shows, with its unit.
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    for number, curve in enumerate(drawn):
        colour = curve.colour or PALETTE[number % len(PALETTE)]
        if curve.low is not None and curve.high is not None and curve.style != "points":
            figure.add_trace(_band(curve, colour))
        figure.add_trace(_line(curve, colour))
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return figure


def bars(drawn: Sequence[Bar], *, x: str) -> Figure:
    """Draw horizontal bars, the first one at the top.

    Args:
        drawn: the bars.
        x: what the length of a bar shows, with its unit.
    """
    import plotly.graph_objects as go

    places = list(range(len(drawn)))
    figure = go.Figure(
        go.Bar(
            orientation="h",
            x=[_known(bar.value) for bar in drawn],
            y=places,
            width=0.62,
            marker={"color": [bar.colour or PALETTE[0] for bar in drawn]},
            error_x=_errors(
                [bar.value for bar in drawn], [b.low for b in drawn], [b.high for b in drawn]
            ),
            text=[f"{bar.name}: {_interval(bar.value, bar.low, bar.high)}" for bar in drawn],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    )
    names = [_short(bar.name) for bar in drawn]
    figure.update_xaxes(title=x)
    figure.update_yaxes(
        tickvals=places, ticktext=names, autorange="reversed", showgrid=False, zeroline=False
    )
    figure.update_layout(height=110 + 38 * len(drawn))
    return figure


def heat_map(
    values: Sequence[Values],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    meaning: str,
    labels: Sequence[Sequence[str]] | None = None,
    x: str = "",
    y: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Draw a table of numbers as colours, the first row at the top.

    Args:
        values: by row and column; None and NaN leave the cell blank, infinity has the colour of the
            largest number.
        rows: the name of each row.
        columns: the name of each column.
        meaning: what a colour means, with the unit; the page writes it above the colour scale.
        labels: the text of each cell, which hovering shows after its row and column; the number
            in four digits if None.
        x: what the columns are.
        y: what the rows are.
        low: the number with the first colour of the scale; the smallest one if None.
        high: the number with the last colour; the largest one if None.
    """
    import plotly.graph_objects as go

    finite = [v for line in values for v in line if v is not None and math.isfinite(v)] or [0.0]
    named = [_titled(y, row) for row in rows], [_titled(x, column) for column in columns]
    texts = labels or [[_number(value) for value in line] for line in values]
    least, most = min(finite) if low is None else low, max(finite) if high is None else high
    figure = go.Figure(
        go.Heatmap(
            z=[[_within(value, most) for value in line] for line in values],
            x=list(range(len(columns))),
            y=list(range(len(rows))),
            text=[
                [f"{row}, {column}: {said}" for column, said in zip(named[1], line, strict=True)]
                for row, line in zip(named[0], texts, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            xgap=1,
            ygap=1,
            zmin=least,
            zmax=most if most > least else least + 1,
            colorscale=[[at / (len(_SCALE) - 1), colour] for at, colour in enumerate(_SCALE)],
            colorbar=_SCALE_BAR,
            showlegend=False,
        )
    )
    plain = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(title=x, autotickangles=[0, 90], **plain, **_ticks(columns))
    figure.update_yaxes(title=y, autorange="reversed", **plain, **_ticks(rows))
    size = min(26.0, max(11.0, 900 / max(1, len(rows))))
    height = round(140 + size * max(3, len(rows)))
    figure.update_layout(height=height, margin={"t": 48}, meta={"meaning": meaning})
    return figure


def _line(curve: Curve, colour: str) -> Scatter:
    from plotly.graph_objects import Scatter

    alone = curve.style == "points"
    ends: tuple[Values, Values] = (
        curve.low if curve.low is not None else [None] * len(curve.y),
        curve.high if curve.high is not None else [None] * len(curve.y),
    )
    said = [_interval(*each) for each in zip(curve.y, *ends, strict=True)]
    labels = list(curve.labels) or [""] * len(said)
    return Scatter(
        name=curve.name,
        x=list(curve.x),
        y=[_known(value) for value in curve.y],
        mode={"points": "markers", "line": "lines+markers"}.get(curve.style, "lines"),
        line={"color": colour, "dash": _DASHES[curve.style], "width": 2},
        marker={"color": colour, "size": 9 if alone else 6},
        error_y=_errors(curve.y, *ends) if alone else None,
        text=[
            f"{label}: {each}" if label else each for label, each in zip(labels, said, strict=True)
        ],
        hovertemplate="%{text}",
    )


def _band(curve: Curve, colour: str) -> Scatter:
    """The shaded interval of a curve."""
    from plotly.graph_objects import Scatter

    assert curve.low is not None
    assert curve.high is not None
    known = [
        (x, low, high)
        for x, low, high in zip(curve.x, curve.low, curve.high, strict=True)
        if low is not None and high is not None
    ]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return Scatter(
        x=[x for x, _, _ in known] + [x for x, _, _ in reversed(known)],
        y=[high for _, _, high in known] + [low for _, low, _ in reversed(known)],
        mode="lines",
        line={"width": 0, "color": colour},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.22)",
        hoverinfo="skip",
        showlegend=False,
    )


def _errors(values: Values, low: Values, high: Values) -> dict[str, Any] | None:
    """The intervals around values as plotly's error bars; None if there are none."""
    if all(end is None for end in (*low, *high)):
        return None

    def apart(one: float | None, other: float | None) -> float:
        return 0.0 if one is None or other is None else max(0.0, one - other)

    return {
        "type": "data",
        "symmetric": False,
        "array": [apart(end, value) for value, end in zip(values, high, strict=True)],
        "arrayminus": [apart(value, end) for value, end in zip(values, low, strict=True)],
        "color": "#8A8A8A",
        "thickness": 1.5,
        "width": 4,
    }


def _titled(title: str, name: str) -> str:
    """A row's or a column's name: a number needs the axis' title."""
    return f"{title} {name}" if title and name[:1].isdigit() else name


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    steps = (step for step in (1, 2, 5, 10, 20, 50) if len(names) <= step * _MOST_LABELS)
    step = next(steps, max(1, len(names) // 10))
    places = list(range(0, len(names), step))
    return {"tickvals": places, "ticktext": [_short(names[place]) for place in places]}


def _within(value: float | None, most: float) -> float | None:
    """A number that JSON has: None for NaN, the largest number for infinity."""
    if value is None or math.isnan(value):
        return None
    return most if math.isinf(value) else value


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return _number(value)
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
