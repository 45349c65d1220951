"""A page shows every text as text, loads nothing, and has plotly's code at most once."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from plotly.graph_objects import Figure, Scatter

from diffxfer.errors import OutputError
from diffxfer.pages.page import Cell, Page

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "</pre></script><script src=//evil.example>\u202e\"'&amp;"
SHOWN = EVIL.replace("\u202e", "\\u202e")


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def with_all(text: str) -> Page:
    page = Page(text)
    page.verdict([text, text])
    page.heading(text)
    page.paragraph(text)
    page.bullets([text])
    page.preformatted(f"{text}\n  {text}")
    page.table([text, text], [[Cell(text, text), Cell(text, text, best=True)]], text)
    page.table([text, text], [[Cell(text), Cell(text)]], text, grid=True)
    page.facts([(text, text)])
    page.explain(text)
    return page


def drawn(name: str) -> Figure:
    return Figure([Scatter(x=[1, 2], y=[1, 2], name=name, line={"color": "#8A8A8A"})])


def written(page: Page, folder: Path) -> Parsed:
    page.write(folder / "page.html")
    return Parsed((folder / "page.html").read_text("utf-8"))


def test_every_text_is_text(tmp_path: Path) -> None:
    found = written(with_all(EVIL), tmp_path)
    plain = written(with_all("plain"), tmp_path)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert found.text.count(SHOWN) == plain.text.count("plain") == 24
    assert "\u202e" not in found.text
    cells = [attributes for tag, attributes in found.tags if tag == "td"]
    assert cells[1] == {"class": "best", "data-column": SHOWN}


def test_a_page_without_figures_has_no_code(tmp_path: Path) -> None:
    assert "script" not in [tag for tag, _ in written(with_all("plain"), tmp_path).tags]


def test_the_first_figure_brings_the_code_of_all(tmp_path: Path) -> None:
    page = Page("two")
    page.figure(drawn("one"))
    page.figure(drawn(EVIL))
    found = written(page, tmp_path)
    assert found.text.count("plotly.js v") == 1
    assert found.text.count("Plotly.newPlot(") == 2
    assert all(not attributes.keys() & {"src", "href"} for _, attributes in found.tags)
    legend = [attributes["style"] for tag, attributes in found.tags if tag == "i"]
    assert legend == ["border-color:#8A8A8A"] * 2
    assert SHOWN in found.text


def test_a_row_needs_a_cell_for_each_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        Page("p").table(["a", "b"], [[Cell("1")]], "")


def test_a_grid_is_scrolled_and_other_tables_are_folded(tmp_path: Path) -> None:
    found = written(with_all("plain"), tmp_path)
    tables = [attributes for tag, attributes in found.tags if tag == "table"]
    assert tables == [{"class": "rows"}, {}]
    assert ("div", {"class": "grid"}) in found.tags


def test_what_a_figure_means_is_said_below_it(tmp_path: Path) -> None:
    page = Page("p")
    page.figure(drawn("one"))
    page.explain("higher is better.")
    text = written(page, tmp_path).text
    assert text.index("Plotly.newPlot(") < text.index("What this means: higher is better.")


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match=r"page\.html cannot be written"):
        Page("p").write(tmp_path / "page.html")
