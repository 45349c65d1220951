"""Figures have the numbers that they are given, and their texts are texts to plotly too."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.pages.charts import PALETTE, Bar, Curve, bars, curves, heat_map
from diffxfer.pages.page import Page

if TYPE_CHECKING:
    from pathlib import Path

    from plotly.graph_objects import Figure

LINK = '<a href="https://evil.example">x</a><br>\u202e'


def drawn(figure: Figure, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """The traces and the layout that a page's script draws, and the page."""
    page = Page("p")
    page.figure(figure)
    page.write(folder / "page.html")
    text = (folder / "page.html").read_text("utf-8")
    call = text[text.rindex("Plotly.newPlot(") :]
    start = call.index("[")
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(call, start)
    layout, _ = decoder.raw_decode(call, call.index("{", end))
    return traces, layout, text


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in texts(each)]


class TestAHeatMap:
    def test_has_the_numbers_and_their_names(self, tmp_path: Path) -> None:
        figure = heat_map(
            [[1.0, None], [math.nan, math.inf]],
            rows=["0", "1"],
            columns=["q", "head"],
            meaning="how much it changed, in %",
            y="layer",
        )
        [trace], layout, text = drawn(figure, tmp_path)
        # Unknown cells are blank, and an infinite one has the colour of the largest number.
        assert trace["z"] == [[1.0, None], [None, 1.0]]
        assert trace["text"][0] == ["layer 0, q: 1", "layer 0, head: none"]
        assert trace["text"][1][1] == "layer 1, head: inf"
        assert layout["yaxis"]["ticktext"] == ["0", "1"]
        assert layout["yaxis"]["autorange"] == "reversed"
        assert layout["xaxis"]["ticktext"] == ["q", "head"]
        assert '<p class="scale">colour: how much it changed, in %</p>' in text
        assert '<ul class="legend">' not in text

    @pytest.mark.parametrize(
        ("ends", "found"), [((None, None), (0.25, 0.75)), ((0.0, 1.0), (0.0, 1.0))]
    )
    def test_its_scale_has_the_ends_that_are_given(
        self, ends: tuple[float | None, float | None], found: tuple[float, float], tmp_path: Path
    ) -> None:
        figure = heat_map(
            [[0.25, 0.75]], rows=["r"], columns=["a", "b"], meaning="m", low=ends[0], high=ends[1]
        )
        [trace], _, _ = drawn(figure, tmp_path)
        assert (trace["zmin"], trace["zmax"]) == found

    def test_labels_are_shown_instead_of_numbers(self) -> None:
        figure = heat_map([[0.5]], rows=["r"], columns=["c"], meaning="m", labels=[["half"]])
        assert figure.data[0].text[0][0] == "r, c: half"

    def test_of_many_rows_names_some_and_grows(self) -> None:
        small, large = (
            heat_map([[1.0]] * n, rows=[str(i) for i in range(n)], columns=["c"], meaning="m")
            for n in (4, 80)
        )
        assert list(small.layout.yaxis.ticktext) == ["0", "1", "2", "3"]
        assert list(large.layout.yaxis.ticktext)[:3] == ["0", "5", "10"]
        assert small.layout.height < large.layout.height < 1200

    def test_a_row_needs_a_value_for_each_column(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            heat_map([[1.0]], rows=["r"], columns=["a", "b"], meaning="m")


class TestCurves:
    def test_an_interval_is_a_shaded_band(self, tmp_path: Path) -> None:
        curve = Curve("loss", [0, 1, 2], [1.0, None, 3.0], low=[0.5, None, 2], high=[1.5, None, 4])
        [band, line], layout, text = drawn(curves([curve], x="t", y="loss"), tmp_path)
        assert band["x"] == [0, 2, 2, 0]
        assert band["y"] == [1.5, 4, 2, 0.5]
        assert band["fill"] == "toself"
        assert band["hoverinfo"] == "skip"
        assert line["y"] == [1.0, None, 3.0]
        assert line["text"] == ["1 (0.5 to 1.5)", "none", "3 (2 to 4)"]
        assert layout["hovermode"] == "x unified"
        assert layout["xaxis"]["title"]["text"] == "t"
        # A band is no curve of its own.
        assert re.findall(r"<li><i [^>]*></i>([^<]*)</li>", text) == ["loss"]

    def test_a_control_is_dashed_in_the_legend_too(self, tmp_path: Path) -> None:
        found = [
            Curve("one", [0, 1], [1, 2]),
            Curve("control", [0, 1], [1, 2], "dashed"),
            Curve("equal", [0, 1], [0, 1], "dotted"),
            Curve("measured", [0], [1], "points", low=[0.5], high=[1.25], labels=["family A"]),
        ]
        traces, _, text = drawn(curves(found, x="x", y="y"), tmp_path)
        assert [trace["line"]["dash"] for trace in traces] == ["solid", "dash", "dot", "solid"]
        assert [trace["line"]["color"] for trace in traces] == list(PALETTE[:4])
        styles = re.findall(r'<li><i style="[^"]*"( class=\w+)?></i>', text)
        assert styles == ["", " class=dash", " class=dot", " class=point"]
        points = traces[3]
        assert points["mode"] == "markers"
        assert points["error_y"]["array"] == [0.25]
        assert points["error_y"]["arrayminus"] == [0.5]
        assert points["text"] == ["family A: 1 (0.5 to 1.25)"]


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    found = [Bar("a", 0.5, 0.25, 0.75, "#009E73"), Bar("b" * 40, 0.7), Bar("c", math.nan)]
    [trace], layout, _ = drawn(bars(found, x="score"), tmp_path)
    assert trace["x"] == [0.5, 0.7, None]
    assert trace["error_x"]["array"] == [0.25, 0.0, 0.0]
    assert trace["marker"]["color"] == ["#009E73", PALETTE[0], PALETTE[0]]
    assert layout["yaxis"]["ticktext"] == ["a", "b" * 25 + "…", "c"]
    assert trace["text"][1] == "b" * 40 + ": 0.7"


@pytest.mark.parametrize(
    "figure",
    [
        heat_map([[1.0]], rows=[LINK], columns=[LINK], meaning=LINK, x=LINK, y=LINK),
        curves([Curve(LINK, [0], [1], "points", labels=[LINK])], x=LINK, y=LINK),
        bars([Bar(LINK, 1.0)], x=LINK),
    ],
)
def test_plotly_finds_no_markup_in_texts(figure: Figure, tmp_path: Path) -> None:
    traces, layout, text = drawn(figure, tmp_path)
    layout.pop("meta", None)  # plotly does not draw it
    said = [each for each in texts([traces, layout]) if "evil" in each]
    assert said
    assert all("<a" not in each and "\u202e" not in each for each in said)
    assert '<a href="https://evil' not in text
