"""Which modules stand out."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer.family import family_folder
from diffxfer.probing.distances import measure_distances
from diffxfer.probing.figures import Cell, Sums, figures
from diffxfer.probing.standouts import find_standouts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def cell(layer: int | None, delta: float, shift: float, kind: str = "q") -> Cell:
    sums = (1.0, 1.0, 1.0, delta**2, shift**2, 0.0, 0.0, 0.0, 0.0, 0.0)
    return Cell("layers", layer, kind, figures([Sums(((4, sums),))]))


def found(cells: Sequence[Cell]) -> list[tuple[str, float]]:
    return [(each.cell.name, round(each.factor, 6)) for each in find_standouts(cells)]


def test_twice_or_half_the_median_stands_out() -> None:
    cells = [*(cell(layer, 1, 1) for layer in range(5)), cell(5, 1, 3), cell(6, 4, 1)]
    assert found(cells) == [("layers.6 q", 0.25), ("layers.5 q", 3.0)]
    assert found([*cells[:5], cell(5, 1, 1.99), cell(6, 1, 0.51)]) == []


def test_a_kind_that_varies_from_layer_to_layer_needs_more() -> None:
    steady = [cell(layer, 1, 2 ** (layer % 2)) for layer in range(8)]
    assert found([*steady, cell(8, 1, 4)]) == []
    assert found([*steady, cell(8, 1, 64)]) == [("layers.8 q", pytest.approx(32, rel=0.6))]


def test_layers_are_compared_with_their_own_kind() -> None:
    cells = [cell(layer, 1, 9 if kind == "k" else 1, kind) for layer in range(5) for kind in "qk"]
    assert found(cells) == []


def test_few_layers_have_no_verdict() -> None:
    assert found([cell(0, 1, 1), cell(1, 1, 1), cell(2, 1, 50)]) == []
    assert found([cell(None, 1, 50), *(cell(layer, 1, 1) for layer in range(4))]) == []


def test_layers_that_did_not_change() -> None:
    cells = [cell(layer, 1, 1) for layer in range(4)]
    (frozen,) = find_standouts([*cells, cell(4, 0, 1), cell(5, 0, 0)])
    assert (frozen.cell.layer, frozen.ratio, frozen.factor) == (4, math.inf, math.inf)
    told = frozen.as_json()
    assert (told["ratio"], told["factor"], told["median"]) == (None, None, 1.0)
    assert told["kind"] == "q"
    assert found([cell(layer, 0, 1) for layer in range(4)]) == []
    assert found([cell(layer, 1, 0) for layer in range(4)]) == []
    assert found([*(cell(layer, 1, 0) for layer in range(4)), cell(4, 1, 1)]) == [
        ("layers.4 q", math.inf)
    ]


def test_noise_in_one_matrix_of_the_shipped_family(tmp_path: Path) -> None:
    family = family_folder()
    roles = family / "finetuned", family / "base"
    assert measure_distances(*roles, family / "target").standouts == ()
    target = shutil.copytree(family / "target", tmp_path / "target")
    tensors, base = (
        load_file(target / "model.safetensors"),
        load_file(family / "base" / "model.safetensors"),
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    step = tensors[name].float() - base[name].float()
    noise = torch.randn(step.shape, generator=torch.Generator().manual_seed(0))
    tensors[name] = (tensors[name].float() + noise * step.norm() / noise.norm() * 4).bfloat16()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (only,) = measure_distances(*roles, target).standouts
    assert (only.cell.name, only.factor > 3) == ("layers.1 q", True)
