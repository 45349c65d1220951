"""The page of an evaluation has the numbers of the data, claims no more, and names no folder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diffxfer.evaluation.eval_page import write_page
from diffxfer.evaluation.eval_summary import summarize
from diffxfer.evaluation.score_text import short_names
from diffxfer.evaluation.scores import BestAlpha, Evaluation, Row

HOME = "/home/me/models"
EVIL = '</script><img src="https://evil.example/x" onerror=alert(2)>'


def row(model: str, value: float, alpha: float | None = None, **more: Any) -> Row:
    values: dict[str, Any] = {
        "model": f"{HOME}/{model}",
        "alpha": alpha,
        "task": "task",
        "metric": "acc",
        "filter": "none",
        "value": value,
        "stderr": 0.01,
        "n": 400,
        "higher_is_better": True,
        "baseline": f"{HOME}/target",
        "delta": None if model == "target" and alpha is None else value - 0.25,
        "p_value": None if model == "target" and alpha is None else 0.0001,
        "recovered": None if alpha is None else (value - 0.25) / 0.5,
        "recovered_interval": None if alpha is None else (0.4, 0.9),
        "notes": (),
    }
    return Row(**{**values, **more})


def evaluation(*rows: Row, **more: Any) -> Evaluation:
    values: dict[str, Any] = {
        "rows": rows,
        "target": f"{HOME}/target",
        "baseline": f"{HOME}/target",
        "finetuned": f"{HOME}/direct",
        "columns": tuple(dict.fromkeys(each.column for each in rows)),
        "best": None,
        "reused": (),
        "warnings": (),
        "output": Path("/home/me/scores"),
        "elapsed_s": 1.0,
    }
    return Evaluation(**{**values, **more})


def grafted(**more: Any) -> Evaluation:
    command = f"diffxfer apply {HOME}/diff {HOME}/target -o OUT --alpha 1.0"
    best = BestAlpha(1.0, "task", "acc", 0.625, command)
    found = (
        row("target", 0.25, **more),
        row("target", 0.5, 0.5, **more),
        row("target", 0.625, 1.0, **more),
        row("direct", 0.75, **more),
    )
    return evaluation(*found, best=best, warnings=(f"{HOME}/diff is old",))


class Parsed(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem is None:
            self.text += data


def written(found: Evaluation, folder: Path) -> Parsed:
    write_page(found, folder / "report.html")
    return Parsed(folder / "report.html")


def traces(page: Parsed) -> list[dict[str, Any]]:
    """The traces of the last figure."""
    call = page.scripts[-1]
    call = call[call.rindex("Plotly.newPlot(") :]
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(call, call.index("["))[0]
    return found


def test_the_table_has_every_number(tmp_path: Path) -> None:
    page = written(grafted(), tmp_path)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", (tmp_path / "report.html").read_text("utf-8"))
    lines = [cells[at : at + 5] for at in range(0, 20, 5)]
    small = "<small> ± 0.0100</small>"
    assert lines == [
        ["target<small> baseline</small>", f"0.2500{small}", "", "", ""],
        ["target + 0.5·Δ", f"0.5000{small}", "+0.2500", "p&lt;0.001", "50 % [40, 90]"],
        ["target + 1.0·Δ", f"0.6250{small}", "+0.3750", "p&lt;0.001", "75 % [40, 90]"],
        ["direct<small> finetuned</small>", f"0.7500{small}", "+0.5000", "p&lt;0.001", ""],
    ]
    for said in ("higher is better; n = 400; ± standard error", "difference from target"):
        assert said in page.text


def test_the_curve_has_the_scores_and_their_intervals(tmp_path: Path) -> None:
    target, direct, band, grafts = traces(written(grafted(), tmp_path))
    assert (target["y"], target["line"]["dash"]) == ([0.25, 0.25], "dash")
    assert (direct["y"], direct["x"]) == ([0.75, 0.75], [0.0, 1.0])
    assert (grafts["x"], grafts["y"]) == ([0.5, 1.0], [0.5, 0.625])
    assert band["y"] == pytest.approx([0.5196, 0.6446, 0.6054, 0.4804], abs=1e-4)


def test_models_without_a_curve_are_bars(tmp_path: Path) -> None:
    [bars] = traces(written(evaluation(row("target", 0.25), row("direct", 0.75)), tmp_path))
    assert (bars["type"], bars["x"]) == ("bar", [0.25, 0.75])
    assert bars["error_x"]["array"] == pytest.approx([0.0196, 0.0196], abs=1e-4)


def test_one_model_has_a_table_and_no_figure(tmp_path: Path) -> None:
    page = written(evaluation(row("target", 0.25), finetuned=None), tmp_path)
    assert not page.scripts
    assert "task (acc): target scores 0.2500." in page.text


def test_no_folder_of_this_machine_is_named(tmp_path: Path) -> None:
    page = written(grafted(notes=(f"{HOME}/target has no p",)), tmp_path)
    assert "/home" not in page.text + page.scripts[-1]
    for said in ("diffxfer apply …/diff …/target -o OUT --alpha 1.0", "…/diff is old"):
        assert said in page.text


def test_names_are_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    found = grafted(task=EVIL, notes=(EVIL,))
    page, plain = written(found, tmp_path), written(grafted(notes=("n",)), tmp_path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.text.count(EVIL) >= 3
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "action"}
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_the_same_scores_give_the_same_page(tmp_path: Path) -> None:
    pages = set()
    for _ in range(2):
        written(grafted(), tmp_path)
        pages.add((tmp_path / "report.html").read_bytes())
    assert len(pages) == 1


BEST = "task (acc): the best graft, target + 1.0·Δ, scores 0.6250"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {},
            f"{BEST}, which is 0.3750 better than target (p<0.001); it recovers 75 % [40, 90] of"
            " direct fine-tuning's gain.",
        ),
        (
            {"p_value": 0.2, "recovered": None},
            f"{BEST}, which is 0.3750 better than target (p=0.2) and may be chance.",
        ),
        ({"delta": -0.1}, f"{BEST}, which is 0.1000 worse than target (p<0.001)."),
        ({"delta": 0.0}, f"{BEST}, the same as target."),
        ({"delta": None}, f"{BEST}."),
        (
            {"higher_is_better": None},
            "task (acc): target scores 0.2500, target + 0.5·Δ scores 0.5000, target + 1.0·Δ scores"
            " 0.6250, direct scores 0.7500. It is not known whether higher is better.",
        ),
    ],
)
def test_the_summary_claims_what_the_scores_support(more: dict[str, Any], said: str) -> None:
    found = grafted(**more)
    names = short_names([each.model for each in found.rows])
    assert summarize(found, names) == [said, "The best alpha on task is 1.0 (acc 0.6250)."]


def test_lower_scores_win_where_lower_is_better() -> None:
    rows = (row("target", 0.25), row("a", 0.5), row("b", 0.125, delta=-0.125))
    found = evaluation(*(replace(each, higher_is_better=False) for each in rows))
    names = short_names([each.model for each in found.rows])
    said = "the best of them, b, scores 0.1250, which is 0.1250 better than target (p<0.001)."
    assert summarize(found, names) == [f"task (acc): {said}"]
