"""A node that dies while it scores a model. Apart, since a process connects to one cluster."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import RayCluster, evaluate
from tests.cluster import nodes
from tests.evaluation.conftest import FAMILY, QUICK

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("ray")

TARGET = FAMILY / "target"
HOW: dict[str, Any] = {**QUICK, "tasks": "pig_latin_choice", "limit": 6, "alpha": [0.8, 1.2]}

HANGING = """
import pathlib, time
import diffxfer.evaluation.score_on_cluster as module
def hang(piece, report):
    pathlib.Path({marker!r}).touch()
    time.sleep(600)
module.score_on_node = hang
"""


@pytest.mark.slow
def test_a_node_dies_while_it_scores(diff: Path, tmp_path: Path) -> None:
    marker = tmp_path / "begun"
    program = nodes.path_with(tmp_path / "program", HANGING.format(marker=str(marker)))
    how = {**HOW, "diff": diff}
    with nodes.cluster({}, {"env_vars": program}) as made:
        dying = made.list_all_nodes()[-1]

        def kill() -> None:
            nodes.wait_until(marker.exists, 120)
            made.remove_node(dying, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        with RayCluster(made.address) as connected:
            there = evaluate(TARGET, **how, cluster=connected)
        killer.join()
    assert marker.exists()
    assert there.rows == evaluate(TARGET, **how).rows
