"""The page and the table of a chain: untrusted names are escaped, and nothing is fetched."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diffxfer.cli.chain_table import print_chain
from diffxfer.pages.local_paths import without_folders
from diffxfer.recycling.chain_page import write_page
from diffxfer.recycling.chain_report import ChainReport, Round

EVIL = '</script><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(2)>'


def row(task: str, value: float, stderr: float | None, better: bool | None) -> dict[str, Any]:
    return {
        "task": task,
        "metric": "acc",
        "filter": "none",
        "value": value,
        "stderr": stderr,
        "n": 8,
        "higher_is_better": better,
    }


def report(name: str = "m", *, losses: bool = True, better: bool | None = True) -> ChainReport:
    log = {"model": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}], "direct": []}
    first = Round(1, name, None, {"base": [row(name, 0.25, None, better)]}, {})
    scores = {
        "base": [row(name, 0.5, 0.125, better)],
        "graft": [row(name, 0.75, 0.0625, better)],
    }
    second = Round(2, name, 0.8, scores, log if losses else {})
    measures = ((name, "acc", "none"),)
    said = (f"round-02/graft: {name}",)
    return ChainReport(Path("/run"), (first, second), measures, {"bases": [name]}, said, 5, 1.0)


class Page(HTMLParser):
    """Every tag with its attributes, the text of scripts, and the cells of tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)
        else:
            self.text += data


@pytest.mark.parametrize("name", [EVIL, "a & b < c", "plain"])
def test_names_are_text(name: str, tmp_path: Path) -> None:
    write_page(report(name), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    write_page(report(), tmp_path / "plain.html")
    plain = Page(tmp_path / "plain.html")
    # The same elements, whatever the names say.
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert len(page.scripts) == len(plain.scripts)
    assert page.text.count(name) >= 5


def test_names_turn_no_text(tmp_path: Path) -> None:
    write_page(report("a\u202egnp.b\x1b[31m"), tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert text.count(r"a\u202egnp.b\x1b[31m") >= 4
    assert not {"\u202e", "\x1b"} & set(text)


def test_nothing_is_fetched(tmp_path: Path) -> None:
    write_page(report(), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not attributes.keys() & {"src", "href", "srcset", "action"}, tag
    styles = re.search("<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert styles is not None
    assert "url(" not in styles[1]
    assert "@import" not in styles[1]
    # The drawings' own options: no button that sends the data to plotly's server.
    drawn = [script for script in page.scripts if "Plotly.newPlot(" in script]
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    assert len(drawn) == 2
    for script in drawn:
        assert "plotlyServerURL" not in script
        assert "showSendToCloud" not in script
        assert '"displaylogo": false' in script
        buttons = re.search(r'"modeBarButtons": (\[\[.*?\]\])', script)
        assert buttons is not None
        assert set(json.loads(buttons[1])[0]) <= {
            *("toImage", "zoomIn2d", "zoomOut2d", "resetScale2d")
        }


def test_what_is_drawn(tmp_path: Path) -> None:
    write_page(report(), tmp_path / "report.html")
    scores, losses = (
        script
        for script in Page(tmp_path / "report.html").scripts
        if "Plotly.newPlot(" in script and "plotly.js v" not in script
    )
    for values in ('"x":[1,2],"y":[0.25,0.5]', '"array":[0,0.125]', '"name":"graft"'):
        assert values in scores.replace(" ", "")
    assert "NaN" not in scores + losses
    assert '"y":[2.0,null]' in losses.replace(" ", "")
    assert '"name":"2: graft, tuned"' in losses


def test_the_best_is_bold_where_one_is(tmp_path: Path) -> None:
    for better, best in ((True, "0.7500"), (False, "0.5000"), (None, None)):
        write_page(report(better=better), tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        found = re.findall(r'<td class="best"[^>]*>([\d.]+)', page)
        assert found == ([] if best is None else [best])


def test_a_score_that_is_no_number_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = report()
    known.rounds[1].scores["graft"][0]["value"] = None  # as JSON has it
    known.rounds[1].scores["tuned"] = [row("m", 0.4, None, True)]
    write_page(known, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert ">nan<small>" in page
    assert re.findall(r'<td class="best"[^>]*>([\d.]+)', page) == ["0.5000"]
    print_chain(known)
    assert "nan" in capsys.readouterr().out


def test_without_scores_and_training_there_is_nothing_to_draw(tmp_path: Path) -> None:
    rounds = (Round(1, "a", None, {}, {}), Round(2, "b", 1.0, {}, {}))
    empty = ChainReport(Path("/run"), rounds, (), {"bases": ["a", "b"]}, (), 3, 1.0)
    write_page(empty, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not page.scripts
    assert "a → b" in page.text
    assert "Warnings" not in page.text


def test_the_table_prints_names_that_command_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_chain(report("\x1b[31m[red]x"))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    title, heading, first, second = out.splitlines()
    assert title.strip() == "\\x1b[31m[red]x, acc"
    assert heading.split() == ["round", "base", "model", "alpha", "base", "graft"]
    assert first.split() == ["1", "\\x1b[31m[red]x", "0.2500"]
    name, alpha = "\\x1b[31m[red]x", "0.8"
    assert second.split() == ["2", name, alpha, "0.5000", "±", "0.1250", "0.7500", "±", "0.0625"]


@pytest.mark.parametrize(
    ("better", "said"),
    [
        (True, "higher is better; ± standard error"),
        (False, "lower is better; ± standard error"),
        (None, "± standard error"),
    ],
)
def test_which_way_is_better_is_said(better: bool | None, said: str, tmp_path: Path) -> None:
    write_page(report(better=better), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"<caption>{said}</caption>" in page
    assert "mode iter" in page


class TestFoldersOfThisMachine:
    RUN, HOME = Path("/data/me/run"), Path("/data/me/recipes")

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("/data/me/recipes/base", "base"),
            ("/data/me/recipes/../other/base", "../other/base"),
            ("/data/me/run/round-02/graft", "round-02/graft"),
            ("/data/my models/base one", "…/base one"),
            ("/data", "…/data"),
            ("org/name@main", "org/name@main"),
            ("see https://example.org/a/b", "see https://example.org/a/b"),
            ("python /data/x/it.py --data=/data/x/y.jsonl", "python …/it.py --data=…/y.jsonl"),
            ("~/secret/models/it.py", "…/it.py"),
            ("'/data/x/a', (/data/x/b)", "'…/a', (…/b)"),
            ("and/or, 1/2, −/+", "and/or, 1/2, −/+"),
        ],
    )
    def test_are_not_named(self, text: str, shown: str) -> None:
        assert without_folders(text, self.RUN, self.HOME) == shown

    def test_are_not_in_the_page(self, tmp_path: Path) -> None:
        home = Path.home()
        recipe = {
            "bases": [f"{home}/models/a", str(tmp_path / "b")],
            "train": {"command": f"python {home}/train.py --out {{output}}", "data": None},
            "alpha": [0.5, 1.0],
        }
        warnings = (f"{home}/models/a and {tmp_path}/run/round-02 differ",)
        known = replace(report(), run=tmp_path / "run", recipe=recipe, warnings=warnings)
        write_page(known, tmp_path / "report.html", home=tmp_path)
        page = Page(tmp_path / "report.html")
        assert str(home) not in page.text
        assert str(tmp_path) not in page.text
        for said in ("- …/a\n- b\n", "python …/train.py", "…/models/a and round-02 differ"):
            assert said in page.text


def test_cells_say_what_they_are_where_a_row_is_a_block(tmp_path: Path) -> None:
    write_page(report(), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    cells = [attributes.get("data-column") for tag, attributes in page.tags if tag == "td"]
    assert [cell for cell in cells if cell] == ["base alone", "base alone", "graft"]


def test_a_legend_has_every_curve(tmp_path: Path) -> None:
    write_page(report(), tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    for name in ("base alone", "graft", "2: graft, tuned"):
        assert name in text


def test_rows_are_flat_and_have_every_key() -> None:
    known = report()
    known.rounds[1].scores["tuned"] = [{**row("m", 0.4, None, True), "delta": 0.1}]
    found = known.as_json()["rows"]
    keys = ["round", "base", "stage", "alpha", "task", "metric", "filter", "value", "stderr", "n"]
    assert all(list(each) == keys for each in found)
    assert [(each["round"], each["stage"], each["alpha"], each["value"]) for each in found] == [
        (1, "base", None, 0.25),
        (2, "base", None, 0.5),
        (2, "graft", 0.8, 0.75),
        (2, "tuned", 0.8, 0.4),
    ]
    assert json.loads(json.dumps(found)) == found
