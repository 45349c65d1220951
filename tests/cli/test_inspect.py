"""What `diffxfer inspect` prints, to a person and to a program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from diffxfer import compare_checkpoints, inspect_checkpoint
from diffxfer.cli.heat import heat_table
from diffxfer.diffs.inspection.measures import Cell, Measure, percent
from diffxfer.diffs.inspection.places import Place
from tests import families, tiny
from tests.cli.test_console import ESCAPE, on_a_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.tiny import World

LLAMA = ("q", "k", "v", "o", "gate", "up", "down", "norms")


def lines_of(cells: Sequence[Cell], width: int) -> list[str]:
    out = Console(width=width, highlight=False, record=True, file=StringIO())
    out.print(heat_table(cells, width))
    out.file.close()
    return out.export_text().splitlines()


def model(layers: int, kinds: Sequence[str], stack: str = "layers") -> list[Cell]:
    outside = [Cell(Place("", -1, "embedding"), Measure(1, 10, 1.0, 10.0, 1, 10.0))]
    return outside + [
        Cell(Place(stack, layer, kind), Measure(1, 100 + at, 0.1 * at, 10.0, at, 10.0))
        for layer in range(layers)
        for at, kind in enumerate(kinds)
    ]


class TestADiffVector:
    def test_the_table_has_the_numbers_of_the_library(self, family: World) -> None:
        outcome = tiny.run("inspect", family.folders["diff"])
        assert (outcome.status, outcome.err) == (0, "")
        found = inspect_checkpoint(family.folders["diff"])
        lines = [line.split() for line in outcome.out.splitlines()]
        assert lines[0][-6:] == ["a", "diff", "vector:", "finetuned", "−", "base"]
        heads = next(line for line in lines if line[:1] == ["up"])
        assert heads == ["up", "all", "same"]
        for cell in found.cells:
            label = str(cell.place.layer) if cell.place.stack else cell.place.kind
            row = next(line for line in lines if line[:1] == [label] and len(line) > 1)
            share = cell.measure.unchanged_share
            assert share is not None
            shown = [row[1][:-1], row[-1]]
            assert shown == [percent(cell.measure.ratio), percent(share)]
        assert "76 parameters (BF16)" in outcome.out

    def test_json_is_one_object(self, family: World) -> None:
        for name in ("diff", "base"):
            outcome = tiny.run("inspect", family.folders[name], "--json")
            assert (outcome.status, outcome.err) == (0, "")
            found = inspect_checkpoint(family.folders[name]).as_json()
            assert json.loads(outcome.out) == json.loads(json.dumps(found))

    def test_torch_is_not_imported(self, family: World) -> None:
        code = (
            "import sys; sys.argv = ['diffxfer', 'inspect', sys.argv[1]]\n"
            "from diffxfer.cli.main import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'numpy', 'transformers', 'scipy'} & set(sys.modules)"
        )
        command = [sys.executable, "-c", code, str(family.folders["diff"])]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_a_checkpoint_is_its_groups_of_tensors(family: World) -> None:
    outcome = tiny.run("inspect", family.folders["base"])
    assert (outcome.status, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["model.layers.*.mlp.up_proj.weight", "BF16", "3", "×", "4", "2", "24"] in lines
    assert ["architecture", "LlamaForCausalLM"] in lines


def test_a_graft_says_from_what(family: World, tmp_path: Path) -> None:
    folders = (family.folders["diff"], family.folders["target"])
    tiny.run("apply", *folders, "-o", tmp_path / "graft", "--alpha", "0.5")
    outcome = tiny.run("inspect", tmp_path / "graft")
    assert "graft: a graft: target + α·Δ" in outcome.out
    assert re.search(r"diff vector +diff \(.*; from finetuned finetuned, base base\)", outcome.out)
    assert re.search(r"made by +diffxfer \S+ apply alpha=0.5", outcome.out)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    outcome = tiny.run("inspect", tmp_path / "nothing", "--json")
    assert outcome.status == 1
    assert json.loads(outcome.out)["error"]["type"] == "CheckpointError"
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1


def test_no_name_does_anything_to_a_terminal(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "f\x1b[2J", tmp_path / "b"
    names = ("evil\x1b[31m.0.x\x1b]0;.weight", "[red]y[/red].weight", "a\n.0.[b].weight")
    for scale, folder in enumerate((theirs, ours)):
        tensors = {name: torch.full((2,), 1.0 + scale) for name in names}
        families.save_tensors(folder, tensors, {"architectures": ["\x1b[2J"]})
    tiny.run("extract", ours, theirs, "-o", tmp_path / "diff")
    for folder in (ours, tmp_path / "diff"):
        outcome = tiny.run("inspect", folder)
        assert (outcome.status, outcome.err) == (0, "")
        assert "\x1b" not in outcome.out
        assert "\\x1b" in outcome.out
        assert "[red]y[/red]" in outcome.out or folder != ours
        assert "[b]" in outcome.out


class TestTwoOfThem:
    def test_the_tables_have_the_numbers_of_the_library(self, family: World) -> None:
        pair = family.folders["base"], family.folders["target"]
        outcome = tiny.run("inspect", *pair)
        assert outcome.status == 0
        assert re.fullmatch(r"read 304 bytes in \d+\.\d s\n", outcome.err)
        found = compare_checkpoints(*pair)
        lines = [line.split() for line in outcome.out.splitlines()]
        assert lines[0] == ["A:", str(pair[0])]
        assert lines[1] == ["B:", str(pair[1])]
        assert next(line for line in lines if line[:1] == ["up"]) == ["up", "all", "same", "cosine"]
        total = next(line for line in lines if line[:1] == ["all"])
        assert total[2][:-1] == percent(found.norms.ratio)
        assert total[-1] == f"{found.norms.cosine:.5f}"
        changed = [line for line in lines if line[0:1] and line[0].endswith(".weight")]
        ratios = {tensor.name: tensor.measure for tensor in found.tensors}
        for name, ratio, _, cosine, same in changed:
            measure = ratios[name]
            assert measure is not None
            shown = (percent(measure.ratio), f"{measure.cosine:.5f}")
            assert (ratio, cosine, same) == (*shown, percent(measure.unchanged_share or 0))
        order = [ratios[line[0]].ratio for line in changed]  # type: ignore[union-attr]
        assert order == sorted(order, reverse=True)

    def test_json_is_one_object(self, family: World) -> None:
        pair = family.folders["base"], family.folders["finetuned"]
        outcome = tiny.run("inspect", *pair, "--json", "--quiet", "--threads", "1")
        assert (outcome.status, outcome.err) == (0, "")
        value, expected = json.loads(outcome.out), compare_checkpoints(*pair).as_json()
        assert value.pop("elapsed_s") >= 0
        expected.pop("elapsed_s")
        assert value == json.loads(json.dumps(expected))

    def test_what_cannot_be_compared_is_told(self, tmp_path: Path) -> None:
        sides = (
            {"a.weight": torch.ones(2), "n.weight": torch.tensor([float("nan")])},
            {"b\x1b.weight": torch.ones(2), "n.weight": torch.ones(1)},
        )
        more = {"i": torch.arange(2), "s.weight": torch.ones(2)}, {"i": torch.arange(1, 3)}
        for name, own, extra in zip("xy", sides, more, strict=True):
            other = {"s.weight": torch.ones(3), "same": torch.arange(3)}
            families.save_tensors(tmp_path / name, {**other, **own, **extra})
        outcome = tiny.run("inspect", tmp_path / "x", tmp_path / "y", "-q")
        assert (outcome.status, outcome.err) == (0, "")
        lines = [re.split(r" {2,}", line.strip()) for line in outcome.out.splitlines()]
        assert ["not finite", "n.weight (NaN or infinity, left out of the norms)"] in lines
        assert ["only in A", "1: a.weight"] in lines
        assert ["only in B", r"1: b\x1b.weight"] in lines
        assert ["not compared", "s.weight: F32 (2,) in A, F32 (3,) in B"] in lines
        same = "the same: 1 of 2 tensors of other dtypes; not: i"
        assert ["as bytes", same] in lines


class TestOnATerminal:
    @pytest.mark.parametrize("columns", [80, 120])
    def test_lines_fit_and_colour_says_the_same_again(self, family: World, columns: int) -> None:
        status, written = on_a_terminal("inspect", str(family.folders["diff"]), columns=columns)
        assert status == 0
        assert "\x1b[30;" in written
        plain = tiny.run("inspect", family.folders["diff"]).out
        lines = ESCAPE.sub("", written).replace("\r", "").splitlines()
        assert max(map(len, lines)) <= columns
        heat = [line.split() for line in plain.splitlines() if line.endswith(("25.0█", "0 "))]
        assert heat == [line.split() for line in lines if line.endswith(("25.0█", "0 "))]

    @pytest.mark.parametrize("columns", [80, 120])
    def test_a_comparison_fits_too(self, family: World, columns: int) -> None:
        pair = [str(family.folders[role]) for role in ("base", "target")]
        status, written = on_a_terminal("inspect", *pair, "-q", columns=columns)
        assert status == 0
        lines = ESCAPE.sub("", written).replace("\r", "").splitlines()
        assert max(map(len, lines)) <= columns


class TestTheHeatTable:
    @pytest.mark.parametrize("layers", [1, 24, 25, 32, 61, 126, 1000])
    def test_any_number_of_layers_fits_a_screen(self, layers: int) -> None:
        lines = lines_of(model(layers, LLAMA), 80)
        assert len(lines) <= 28
        assert max(map(len, lines)) <= 80
        assert lines[0].split() == [*LLAMA, "all", "same", "cosine"]
        rows = [line.split()[0] for line in lines[1:-2]]
        ends = [(int(row.split("–")[0]), int(row.split("–")[-1])) for row in rows]
        assert [n for low, high in ends for n in range(low, high + 1)] == list(range(layers))

    def test_all_that_is_outside_of_layers_fits_too(self) -> None:
        for count in (12, 13, 20_000):
            cells = [
                Cell(Place("", -1, f"k{number}"), Measure(1, number + 1, 3.0, 4.0))
                for number in range(count)
            ]
            rows = [line.split() for line in lines_of(cells, 80)[1:]]
            assert len(rows) == 13
            shared = [] if count == 12 else ["other"]
            largest = [f"k{number}" for number in range(count)][len(shared) - 12 :]
            assert [row[0] for row in rows] == [*largest, *shared, "all"]
            assert rows[-1][1] == "75.0█"

    def test_names_of_any_kind_are_put_in_order_at_once(self) -> None:
        layers = [Cell(Place("h", n, "q"), Measure(1, 1, 1.0, 4.0)) for n in range(60_000)]
        assert lines_of(layers, 80)[-2].split() == ["57500–59999", "25.0█", "25.0█"]
        kinds = [Cell(Place("h", 0, f"q{n}"), Measure(1, n, 1.0, 4.0)) for n in range(20_000)]
        assert "other" in lines_of(kinds, 80)[0] + lines_of(kinds, 80)[1]

    def test_kinds_that_do_not_fit_share_a_column(self) -> None:
        cells = model(2, [f"module{number:02}" for number in range(30)])
        lines = lines_of(cells, 80)
        assert max(map(len, lines)) <= 80
        assert "other" in lines[0] + lines[1]
        assert "other" not in lines_of(cells, 1000)[0]

    def test_stacks_have_a_line_of_their_own(self) -> None:
        cells = sorted(
            [*model(2, ("q",)), *model(3, ("v",), "vision.blocks")[1:]], key=lambda c: c.place
        )
        first = [line.split()[0] for line in lines_of(cells, 80)]
        assert first[1:] == ["layers", "0", "1", "vision.blocks", "0", "1", "2", "embedding", "all"]

    def test_bars_are_as_high_as_cells_are_large(self) -> None:
        cells = [
            Cell(Place("h", 0, kind), Measure(1, 1, ratio, 1.0))
            for kind, ratio in (("a", 0.0), ("b", 1e-9), ("c", 0.5), ("d", 1.0))
        ]
        numbers = lines_of(cells, 80)[1].split()
        assert numbers[1:5] == ["0", "1e-7▁", "50.0▄", "100█"]

    def test_a_base_of_zeros(self) -> None:
        cells = [Cell(Place("h", 0, "a"), Measure(1, 1, 1.0, 0.0))]
        assert "∞" in lines_of(cells, 80)[1]
        assert "nan" not in "".join(lines_of(cells, 80))


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (0.0, "0"),
        (1.0, "100"),
        (0.9996, "100"),
        (0.5, "50.0"),
        (0.09996, "10.0"),
        (0.0123, "1.23"),
        (0.00123, "0.12"),
        (0.0001, "0.01"),
        (0.00001, "1e-3"),
        (12.345, "1234"),
        (99.999, "1e4"),
        (1e300, "1e302"),
        (float("inf"), "∞"),
    ],
)
def test_a_share_in_percent(ratio: float, shown: str) -> None:
    assert percent(ratio) == shown
