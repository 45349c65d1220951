"""The page of a probe: its numbers are the report's, texts are text, and nothing is loaded."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import probe
from diffxfer.family import family_folder
from diffxfer.probing.paths import SkippedPath
from diffxfer.probing.probe_page import make_page
from diffxfer.probing.probe_text import summarize
from tests.probing.test_probe import paragraphs

if TYPE_CHECKING:
    from diffxfer.probing.report import ProbeReport

FAMILY = family_folder()
EVIL = "</script><script src=//evil.example>\"'&amp;"


class Parsed(HTMLParser):
    """The visible text of a page, and what its tags ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown = ""
        self.tags: list[str] = []
        self.asked: list[str] = []
        self._code = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._code = tag in ("script", "style")
        self.asked += [str(value) for name, value in attrs if name in ("src", "href", "data")]

    def handle_endtag(self, _tag: str) -> None:
        self._code = False

    def handle_data(self, data: str) -> None:
        self.shown += "" if self._code else data


@functools.cache
def report() -> ProbeReport:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in paragraphs(2)))
        return probe(
            *(FAMILY / role for role in ("finetuned", "base", "target")),
            direct=FAMILY / "direct",
            data=path,
            tasks="pig_latin_choice",
            include_path=FAMILY / "tasks",
            limit=4,
            alpha=(0.5, 1.0),
            points=2,
            device="cpu",
        )


def page(found: ProbeReport, folder: Path) -> tuple[str, Parsed]:
    make_page(found).write(folder / "page.html")
    text = (folder / "page.html").read_text("utf-8")
    return text, Parsed(text)


def test_the_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    found = report()
    text, parsed = page(found, tmp_path)
    assert found.alphas is not None
    for point in found.alphas:
        assert f"{point.loss:.4f} ± {point.loss_stderr:.4f}" in parsed.shown
        assert f"{point.scores[0]['value']:.4f} ± {point.scores[0]['stderr']:.4f}" in parsed.shown
    for path in found.paths or ():
        assert not isinstance(path, SkippedPath)
        assert path.interval is not None
        ends = f"{path.points[0].loss:.3f}, {path.points[-1].loss:.3f}"
        shown = f"{path.barrier:.3f}", f"{path.interval[0]:.3f} to {path.interval[1]:.3f}", ends
        assert all(each in parsed.shown for each in shown)
    for pair in found.attention or ():
        for said in (pair.cosine, pair.jensen_shannon):
            assert said is not None
            values = said.mean, said.other_heads, said.uniform, said.permuted
            assert all(f"{value:.3f}" in parsed.shown for value in values)
    total = found.distances.total
    assert f"{total.ratio:.4g}" in parsed.shown
    assert total.direct is not None
    assert f"{total.direct.cosine_delta_gain:.4f}" in parsed.shown
    assert f"{total.sign_agreement:.2%}" in parsed.shown
    assert all(line in parsed.shown for line in summarize(found))
    assert len(re.findall(r"Plotly\.newPlot\(", text)) >= 9


def test_each_section_says_what_it_means(tmp_path: Path) -> None:
    text, parsed = page(report(), tmp_path)
    headings = parsed.tags.count("h2")
    assert headings == text.count("What this means:") == 7


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    _, parsed = page(report(), tmp_path)
    assert parsed.asked == []
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)


def test_there_is_no_local_path(tmp_path: Path) -> None:
    found = replace(report(), warnings=(f"{FAMILY}/base: a warning", "/srv/secret/x: another"))
    text, _ = page(found, tmp_path)
    for folder in (FAMILY, FAMILY.parent, tmp_path, Path.home(), Path("/srv/secret")):
        assert f"{folder}/" not in text
    assert "base: a warning" in text


def test_models_of_the_hub_keep_their_name(tmp_path: Path) -> None:
    found = replace(report(), models={"finetuned": "org/name@main", "base": str(FAMILY / "base")})
    _, parsed = page(found, tmp_path)
    assert "org/name@main" in parsed.shown
    assert "base" in parsed.shown


def test_every_text_is_text(tmp_path: Path) -> None:
    found = report()
    _, plain = page(found, tmp_path)
    assert found.alphas is not None
    scores = [{**found.alphas[0].scores[0], "task": EVIL, "metric": EVIL}]
    broken = replace(
        found,
        models={EVIL: EVIL},
        notes=[EVIL],
        warnings=(EVIL,),
        alphas=[replace(point, scores=scores) for point in found.alphas],
        paths=[*(found.paths or ()), SkippedPath((EVIL, EVIL), True, EVIL)],
        attention=[replace(pair, pair=(EVIL, EVIL)) for pair in found.attention or ()],
        hidden=[replace(pair, reason=EVIL, mean=None) for pair in found.hidden or ()],
        agreement=[replace(pair, reason=EVIL) for pair in found.agreement or ()],
    )
    text, parsed = page(broken, tmp_path)
    assert parsed.tags.count("script") == plain.tags.count("script") - 1  # no figure of hidden
    assert "<script src=//evil" not in text
    assert parsed.shown.count("evil.example") > 10


def test_a_report_of_weights_alone(tmp_path: Path) -> None:
    found = probe(*(FAMILY / role for role in ("finetuned", "base", "target")))
    _, parsed = page(found, tmp_path)
    assert parsed.tags.count("h2") == 2
    assert "This forecast is made of weights alone." in parsed.shown


def with_values(*values: float, higher: bool = True) -> list[Any]:
    """The target, direct and two grafts with these scores."""
    found = report().alphas or ()
    return [
        replace(point, scores=[{**point.scores[0], "value": value, "higher_is_better": higher}])
        for point, value in zip(found, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("values", "higher", "said"),
    [
        ((0.2, 0.6, 0.3, 0.5), True, "the graft at alpha 1 recovers 75% of direct's gain."),
        ((0.6, 0.2, 0.3, 0.5), False, "the graft at alpha 0.5 recovers 75% of direct's gain."),
        ((0.6, 0.2, 0.3, 0.5), True, "direct is not better than the target, so it has no gain."),
        ((0.6, 0.6, 0.3, 0.5), True, "direct is not better than the target, so it has no gain."),
    ],
)
def test_what_is_recovered_in_words(values: tuple[float, ...], higher: bool, said: str) -> None:
    lines = summarize(replace(report(), alphas=with_values(*values, higher=higher)))
    assert f"Measured on pig_latin_choice: {said}" in lines
