"""`diffxfer probe` as a person and a script use it."""

from __future__ import annotations

import json
import shutil
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
    assert lines[-1].startswith("none: ")
    assert "direct" not in outcome.out


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
    assert value["forecast"] is None


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
