"""`diffxfer probe` as a person and a script use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from diffxfer import probe
from diffxfer.family import family_folder
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tiny import World

FAMILY = family_folder()
THREE = [str(FAMILY / role) for role in ("finetuned", "base", "target")]
DIRECT = ("--direct", str(FAMILY / "direct"))


def test_three_models() -> None:
    outcome = tiny.run("probe", *THREE)
    assert outcome.status == 0
    assert "read 4.93 MB in" in outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert f"target: {THREE[2]}" in lines
    assert "compared 39 tensors, 821,120 parameters; rows pair by id" in lines
    assert any(line.startswith("ratio 0.213, ‖shift‖ / ‖Δ‖: the smaller") for line in lines)
    total = probe(*THREE).distances.total
    (cosine,) = [line for line in lines if line.startswith("Δ, shift cosine ")]
    assert cosine.startswith(f"Δ, shift cosine {total.cosine_delta_shift:.4f}, 52.7 % equal signs")
    assert any(line.startswith("q 0.248 51.9 12.9 0.9918") for line in lines)
    assert any(line.startswith("norms outside layers 0.138 ") for line in lines)
    assert any(line.startswith("none: ") for line in lines)
    assert "Δ,g" not in outcome.out
    (said,) = [line for line in lines if line.startswith("A graft may recover ")]
    found = probe(*THREE).forecast
    assert found is not None
    assert said.startswith(f"A graft may recover {found.low:.0f} to {found.high:.0f} % of ")
    assert lines[-1].startswith("This forecast is made of weights alone. --forward ")


def test_with_direct() -> None:
    out = tiny.run("probe", *THREE, *DIRECT).out
    assert f"direct: {DIRECT[1]}" in out
    gain = probe(*THREE, direct=DIRECT[1]).distances.total.direct
    assert gain is not None
    assert f"cosine {gain.cosine_delta_gain:.4f}, 61.2 % equal signs" in out
    assert "gain = direct − target" in out
    assert out.count("cos Δ,g") == 2, "a column, and what it means"


def test_json_is_the_contract() -> None:
    outcome = tiny.run("probe", *THREE, *DIRECT, "--json")
    value = json.loads(outcome.out)
    assert value.keys() >= {"distances", "forecast", "paths", "attention", "agreement"}
    assert value["models"]["direct"] == DIRECT[1]
    expected = probe(*THREE, direct=DIRECT[1]).as_json()
    assert value["distances"]["total"] == expected["distances"]["total"]
    assert value["distances"]["relations"][1]["roles"] == ["base", "target"]
    assert value["forecast"].keys() >= {"low", "high", "ratio"}
    assert value["paths"] is value["attention"] is value["agreement"] is None


def test_what_stands_out_is_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    target = shutil.copytree(FAMILY / "target", tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name].float() + torch.eye(320, 128)).bfloat16()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    out = tiny.run("probe", *THREE[:2], target).out
    assert "layers.1 up: target moved more for its Δ, ratio " in out


def test_unrelated_models_are_warned_of(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    target = shutil.copytree(FAMILY / "target", tmp_path / "target")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(t.shape, generator=generator).to(t.dtype)
        for name, t in load_file(target / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    outcome = tiny.run("probe", *THREE[:2], target)
    assert outcome.status == 0
    assert "warning: base and target are unrelated: the cosine of " in outcome.err


@pytest.mark.parametrize("role", ["finetuned", "base", "target"])
def test_a_model_that_is_not_there_is_one_line(world: World, role: str) -> None:
    folders = {each: str(world.folders[each]) for each in ("finetuned", "base", "target")}
    folders[role] = "./nothing"
    outcome = tiny.run("probe", *folders.values())
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: nothing: no such folder")


def test_an_error_as_json() -> None:
    outcome = tiny.run("probe", *THREE, "--direct", "./nothing", "--json")
    assert outcome.status == 1
    assert "no such folder" in json.loads(outcome.out)["error"]["problem"]


ROWS = [
    {"text": f"row {number}: " + "a text that is long enough to read " * 6} for number in range(3)
]


def rows_file(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(path)


MEASURE = ("--points", "2", "--rows", "2", "--device", "cpu")


def test_everything_on_the_terminal(tmp_path: Path) -> None:
    page = tmp_path / "page"
    data = ("--data", rows_file(tmp_path), "--alpha", "0.5,1", "-o", page)
    outcome = tiny.run("probe", *THREE, *DIRECT, *data, *MEASURE)
    assert outcome.status == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    value = json.loads((page / "probe.json").read_text("utf-8"))
    for point in value["alphas"]:
        alpha = "" if point["alpha"] is None else f", alpha {point['alpha']:g}"
        assert f"{point['model']}{alpha} {point['loss']:.4f} {point['accuracy']:.1%}" in lines
    for path in value["paths"]:
        name = f"{path['ends'][0]} to {path['ends'][1].removesuffix(' permuted')}"
        name += ", control" if path["control"] else ""
        assert any(line.startswith(f"{name} {path['barrier']:.3f} ") for line in lines)
    for pair in value["attention"]:
        start = f"{' and '.join(pair['pair'])} {pair['mean']:.3f} {pair['other_heads']:.3f}"
        assert any(line.startswith(start) for line in lines)
    graft = f"graft = target + {value['graft_alpha']:g} · Δ"
    titles = [
        "the graft, measured",
        f"loss between two models, {graft}",
        f"attention of corresponding heads, cosine, {graft}",
        f"agreement of predictions, {graft}",
        "forecast",
    ]
    assert [line for line in lines if line in titles] == titles
    said = outcome.err.splitlines()
    assert said[0] == "reading weights"
    assert said[1].startswith("models in float32 on cpu: up to 8.21 MB of memory; ")
    assert f"wrote {page / 'probe.html'} and probe.json beside it" in said
    assert "warning" not in outcome.err


@pytest.mark.slow
def test_tasks_print_one_json_object_and_nothing_of_libraries() -> None:
    tasks = ("--tasks", "pig_latin", "--include-path", FAMILY / "tasks", "--limit", "2")
    command = [*map(str, ("probe", *THREE, *tasks, *MEASURE, "--json"))]
    code = "from diffxfer.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    value = json.loads(done.stdout)
    assert value["alphas"][0]["scores"][0]["task"] == "pig_latin"
    assert value["paths"][0]["points"][0]["scores"][0]["n"] == 2
    assert value["agreement"] is None
    assert any("float32, as by `eval` with --dtype float32" in note for note in value["notes"])
    starts = ("reading", "models in", "base reads", "scoring", "comparing", "on the path")
    assert all(line.startswith(starts) for line in done.stderr.splitlines()), done.stderr


def test_quiet_prints_the_result_alone() -> None:
    outcome = tiny.run("probe", *THREE, "--forward", "--device", "cpu", "--quiet")
    assert (outcome.status, outcome.err) == (0, "")
    assert "give results that differ from base's by " in outcome.out
    assert "--forward" not in outcome.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data", "nothing.jsonl"), "nothing.jsonl"),
        (("-o", THREE[0]), "is the input"),
    ],
)
def test_errors_are_one_line(options: tuple[str, ...], said: str) -> None:
    outcome = tiny.run("probe", *THREE, *options)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--alpha", "0.5"), "--alpha: applies only where --data or --tasks is given"),
        (("--limit", "5"), "--limit: applies only where --tasks is given"),
    ],
)
def test_an_option_that_would_do_nothing_is_a_wrong_use(
    options: tuple[str, ...], said: str
) -> None:
    outcome = tiny.run("probe", *THREE, *options)
    assert (outcome.status, outcome.out) == (2, "")
    assert said in outcome.err
