"""Scoring on a real Ray cluster of two nodes: the scores, files and errors of one machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import Evaluation, RayCluster, evaluate
from tests.cluster import nodes
from tests.evaluation.conftest import FAMILY, QUICK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ray")

TARGET, DIRECT = FAMILY / "target", FAMILY / "direct"
TASKS = ["pig_latin_choice", "docstrings"]
HOW: dict[str, Any] = {**QUICK, "tasks": TASKS, "limit": 6}
OF_A_RUN = {"date", "start_time", "end_time", "total_evaluation_time_seconds"}
"""lm-eval's keys that no two runs share."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with nodes.cluster({}, {}) as made:
        yield made.address


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[RayCluster]:
    with RayCluster(address) as connected:
        yield connected


def compared(found: Evaluation) -> dict[str, Any]:
    return {key: value for key, value in found.as_json().items() if key not in OF_THIS}


OF_THIS = {"elapsed_s", "output"}


def files(output: Path) -> dict[str, Any]:
    """The content of lm-eval's files, by folder and name without its time."""
    found = {}
    for path in output.glob("*/*.json*"):
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()]
            if (path.suffix == ".jsonl")
            else [json.loads(path.read_text())]
        )
        name = f"{path.parent.name}/{path.name.split('_202')[0]}"
        found[name] = [{k: v for k, v in one.items() if k not in OF_A_RUN} for one in lines]
    return found


def test_three_alphas_on_two_nodes(cluster: RayCluster, diff: Path, tmp_path: Path) -> None:
    how = {**HOW, "diff": diff, "alpha": [0.8, 1.0, 1.2], "finetuned": DIRECT}
    bar: list[tuple[str, int, int]] = []
    there = evaluate(
        *(TARGET,),
        **how,
        output=tmp_path / "there",
        cluster=cluster,
        answered=lambda *seen: bar.append(seen),
    )
    here = evaluate(TARGET, **how, output=tmp_path / "here")
    assert compared(there) == compared(here)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert len(files(tmp_path / "here")) == 5 * 3, "results and two tasks of five models"
    assert {name for name, _, _ in bar} == {"5 models"}
    assert bar[-1][1] <= bar[-1][2]
