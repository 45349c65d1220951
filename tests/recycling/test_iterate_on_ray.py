"""Chains whose steps run side by side on a real Ray cluster: the folders of one machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import RayCluster, iterate
from tests.cluster import nodes
from tests.recycling.chains import EVAL, TRAIN, left, make_home, models, write_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ray")
pytest.importorskip("trl")

CHAIN: dict[str, Any] = {
    "mode": "dir",
    "alpha": [0.9, 1.2],
    "train": TRAIN,
    "eval": {**EVAL, "limit": 4},
    "controls": ["base", "direct"],
    "keep": "models",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with nodes.cluster({}, {}) as made:
        yield made.address


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[RayCluster]:
    with RayCluster(address) as connected:
        yield connected


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("chain") / "home")


@pytest.mark.slow
def test_steps_side_by_side(cluster: RayCluster, home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(home, **CHAIN)
    told: list[str] = []
    there = iterate(recipe, tmp_path / "there", cluster=cluster, progress=told.append)
    here = iterate(recipe, tmp_path / "here")
    assert models(tmp_path / "there") == models(tmp_path / "here")
    assert left(tmp_path / "there") == left(tmp_path / "here")
    assert there.rows() == here.rows()
    states = [json.loads((tmp_path / run / "state.json").read_text()) for run in ("there", "here")]
    assert [*states[0]["done"]] == [*states[1]["done"]]
