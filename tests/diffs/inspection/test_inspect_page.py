"""The pages of `inspect`: the library's numbers, no markup in names, no folder of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffxfer import apply_diff, compare_checkpoints, extract_diff, inspect_checkpoint
from diffxfer.diffs.inspection.inspect_page import inspection_page
from diffxfer.diffs.inspection.measures import Cell, Measure, percent
from diffxfer.diffs.inspection.places import Place
from diffxfer.diffs.inspection.standouts import spreads
from diffxfer.errors import OutputExistsError
from diffxfer.family import family_folder
from tests import families, tiny

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FOLDER = family_folder()
EVIL = '<img src="https://evil.example/x">'


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


def heat_maps(page: Parsed) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The trace and the layout of each figure."""
    found, decoder = [], json.JSONDecoder()
    for script in page.scripts:
        call = script[script.rfind("Plotly.newPlot(") :]
        if call.startswith("Plotly.newPlot("):
            traces, end = decoder.raw_decode(call, call.index("["))
            layout, _ = decoder.raw_decode(call, call.index("{", end))
            found.append((traces[0], layout))
    return found


def cell(layer: int, kind: str, delta: float, stack: str = "layers") -> Cell:
    return Cell(Place(stack if layer >= 0 else "", layer, kind), Measure(1, 100, delta, 10.0, 5))


@pytest.fixture(scope="module")
def diff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "diff"
    extract_diff(FOLDER / "finetuned", FOLDER / "base", folder)
    return folder


class TestADiffVector:
    @pytest.fixture
    def page(self, diff: Path, tmp_path: Path) -> Parsed:
        inspect_checkpoint(diff, output=tmp_path / "r")
        return Parsed(tmp_path / "r" / "report.html")

    def test_has_the_cells_of_the_library(self, diff: Path, page: Parsed) -> None:
        found = inspect_checkpoint(diff)
        ratios, unchanged = heat_maps(page)
        for (trace, layout), value in (
            (ratios, lambda m: 100 * m.ratio),
            (unchanged, lambda m: 100 * m.unchanged_share),
        ):
            rows, columns = (list(layout[axis]["ticktext"]) for axis in ("yaxis", "xaxis"))
            for each in found.cells:
                place = each.place
                row = rows.index(str(place.layer) if place.stack else place.kind)
                column = columns.index(place.kind if place.stack else "all")
                assert trace["z"][row][column] == pytest.approx(value(each.measure))
        assert columns[-1] == "all"
        for each in found.cells:
            assert percent(each.measure.ratio) in page.text

    def test_says_what_figures_mean_below_each(self, page: Parsed) -> None:
        assert page.text.count("What this means:") == len(heat_maps(page)) == 2

    def test_loads_nothing_and_names_no_folder(self, diff: Path, page: Parsed) -> None:
        for tag, attributes in page.tags:
            assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
            assert not attributes.keys() & {"src", "href", "srcset", "action"}, tag
        assert sum("plotly.js v" in script for script in page.scripts) == 1
        assert str(diff.parent) not in page.text

    def test_the_data_is_what_json_prints(self, diff: Path, tmp_path: Path) -> None:
        out = tmp_path / "r"
        outcome = tiny.run("inspect", diff, "-o", out, "--json")
        assert json.loads((out / "report.json").read_text("utf-8")) == json.loads(outcome.out)
        assert outcome.status == 0

    def test_the_command_says_where_the_page_is(self, diff: Path, tmp_path: Path) -> None:
        out = tmp_path / "r"
        outcome = tiny.run("inspect", diff, "-o", out)
        assert outcome.err == f"the page is {out / 'report.html'}\n"

    def test_is_not_written_into_an_input(self, diff: Path) -> None:
        with pytest.raises(OutputExistsError, match="is inside the input"):
            inspect_checkpoint(diff, output=diff / "r")


def test_a_comparison_has_its_cells_and_the_tensors_that_differ_most(tmp_path: Path) -> None:
    pair = FOLDER / "base", FOLDER / "target"
    compare_checkpoints(*pair, output=tmp_path / "r")
    page = Parsed(tmp_path / "r" / "report.html")
    found = compare_checkpoints(*pair)
    (trace, _), _ = heat_maps(page)
    assert trace["z"][0][0] == pytest.approx(
        next(
            100 * c.measure.ratio for c in found.cells if (c.place.layer, c.place.kind) == (0, "q")
        )
    )
    assert "How target (B) differs from base (A)" in page.text
    assert f"{percent(found.norms.ratio)} % of their size" in page.text
    ranked = sorted(found.tensors, key=lambda t: t.measure.ratio if t.measure else 0, reverse=True)
    at = page.text.index("The tensors that differ most")
    assert re.findall(r"\S+\.weight", page.text[at:])[:3] == [t.name for t in ranked[:3]]
    data = json.loads((tmp_path / "r" / "report.json").read_text("utf-8"))
    assert data["norms"] == found.norms.as_json()
    with pytest.raises(OutputExistsError, match="is the input"):
        compare_checkpoints(*pair, output=FOLDER / "target")


def test_equal_models_are_said_to_be_equal(tmp_path: Path) -> None:
    compare_checkpoints(FOLDER / "base", FOLDER / "base", output=tmp_path / "r")
    text = Parsed(tmp_path / "r" / "report.html").text
    assert "All values that were compared are equal." in text
    assert "stands out" not in text
    assert "The tensors that differ most" not in text


def test_a_model_has_the_number_of_parameters_of_each_place(tmp_path: Path) -> None:
    extract_diff(FOLDER / "finetuned", FOLDER / "base", tmp_path / "diff")
    apply_diff(tmp_path / "diff", FOLDER / "target", tmp_path / "graft", alpha=0.5)
    found = inspect_checkpoint(tmp_path / "graft", output=tmp_path / "r")
    assert sum(size.parameters for size in found.sizes) == found.parameters
    page = Parsed(tmp_path / "r" / "report.html")
    [(trace, layout)] = heat_maps(page)
    assert trace["z"][0][layout["xaxis"]["ticktext"].index("gate")] == 320 * 128
    assert "All 4 layers have 188,672 parameters each." in page.text
    for said in ("graft: a graft", "from finetuned finetuned, base base", "apply alpha=0.5"):
        assert said in page.text
    assert str(tmp_path) not in page.text


def test_layers_that_are_built_otherwise_are_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{at}.mlp.up.weight": torch.ones(4, 4) for at in range(5)}
    tensors["model.layers.2.mlp.up.weight"] = torch.ones(8, 4)
    families.save_tensors(tmp_path / "m", tensors)
    inspect_checkpoint(tmp_path / "m", output=tmp_path / "r")
    said = "4 of 5 layers have 16 parameters each; other numbers: layer 2 (32)."
    assert said in Parsed(tmp_path / "r" / "report.html").text


def test_an_adapter_has_the_parameters_of_its_factors(tmp_path: Path) -> None:
    found = inspect_checkpoint(FOLDER / "adapter", output=tmp_path / "r")
    assert sum(size.parameters for size in found.sizes) == found.parameters
    assert {size.place.kind for size in found.sizes} == {*"qkvo", "gate", "up", "down"}
    page = Parsed(tmp_path / "r" / "report.html")
    [(trace, layout)] = heat_maps(page)
    assert layout["yaxis"]["ticktext"] == ["0", "1", "2", "3"]
    assert sum(row[-1] for row in trace["z"]) == found.parameters


def test_names_are_text(tmp_path: Path) -> None:
    pages = []
    for folder, name in (("evil", EVIL), ("plain", "plain")):
        base = {f"model.layers.0.{name}.weight": torch.ones(2), f"{name}.weight": torch.ones(2)}
        tuned = {key: 2 * tensor for key, tensor in base.items()}
        home = tmp_path / folder
        families.save_tensors(home / "base", base)
        families.save_tensors(home / "sft", tuned)
        compare_checkpoints(home / "base", home / "sft", output=home / "r")
        inspect_checkpoint(home / "base", output=home / "r2")
        pages.append([Parsed(home / each / "report.html") for each in ("r", "r2")])
    for evil, plain in zip(*pages, strict=True):
        assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
        assert EVIL in evil.text
        assert all("<img" not in json.dumps(each) for each in heat_maps(evil))


def test_stacks_have_a_heat_map_each(diff: Path, tmp_path: Path) -> None:
    known = inspect_checkpoint(diff)
    cells = (cell(-1, "head", 1.0), cell(0, "q", 1.0, "text"), cell(0, "q", 2.0, "vision"))
    inspection_page(replace(known, cells=cells)).write(tmp_path / "p.html")
    page = Parsed(tmp_path / "p.html")
    ratios = heat_maps(page)[:2]
    assert [trace["z"] for trace, _ in ratios] == [[[10.0, 10.0], [None, 10.0]], [[20.0, 20.0]]]
    # One scale for all.
    assert [trace["zmax"] for trace, _ in ratios] == [20.0, 20.0]
    assert "Layers of text, and modules outside the layers" in page.text


class TestWhatStandsOut:
    @staticmethod
    def layers(*deltas: float) -> Sequence[Cell]:
        return [cell(at, "q", delta) for at, delta in enumerate(deltas)]

    def test_is_far_from_the_median(self) -> None:
        [layers] = spreads(self.layers(1.0, 1.0, 1.2, 4.0, 0.5))
        assert [each.name for each in layers.outliers] == ["layer 3", "layer 4"]
        assert layers.middle == pytest.approx(0.1)
        assert layers.outliers[0].times == pytest.approx(4.0)
        assert (layers.least.name, layers.most.name) == ("layer 4", "layer 3")

    def test_may_be_nothing(self) -> None:
        [layers] = spreads(self.layers(1.0, 1.1, 1.2))
        assert not layers.outliers

    def test_a_layer_that_did_not_change_comes_first(self) -> None:
        [layers] = spreads(self.layers(1.0, 1.0, 0.0, 4.0))
        assert [each.name for each in layers.outliers] == ["layer 2", "layer 3"]

    @pytest.mark.parametrize("deltas", [(), (1.0, 9.0), (0.0, 0.0, 0.0, 1.0)])
    def test_needs_three_layers_of_which_most_changed(self, deltas: tuple[float, ...]) -> None:
        assert spreads(self.layers(*deltas)) == ()

    def test_kinds_are_told_apart_where_they_are(self) -> None:
        cells = [cell(-1, "norms", 9.0), cell(0, "norms", 1.0), cell(0, "q", 1.0)]
        [kinds] = spreads(cells)
        assert kinds.group == "kinds of modules"
        assert [each.name for each in kinds.outliers] == ["norms outside the layers"]
