"""Chains whose steps run side by side on a real Ray cluster: the folders of one machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import RayCluster, iterate
from diffxfer.errors import OptionError, TrainingError
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


def done(run: Path) -> dict[str, Any]:
    """The results of the steps, as the state has them."""
    found: dict[str, Any] = json.loads((run / "state.json").read_text())["done"]
    return found


def test_grafts_of_three_bases(cluster: RayCluster, home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(home)
    told: list[str] = []
    there = iterate(recipe, tmp_path / "there", cluster=cluster, progress=told.append)
    iterate(recipe, tmp_path / "here")
    assert models(tmp_path / "there") == models(tmp_path / "here")
    assert left(tmp_path / "there") == left(tmp_path / "here")
    assert done(tmp_path / "there") == done(tmp_path / "here")
    assert there.steps_done == len([line for line in told if ", step " in line]) == 4
    assert iterate(recipe, tmp_path / "there", cluster=cluster).steps_done == 0


def test_gpus_without_a_cluster(home: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--gpus-per-model: is for a cluster"):
        iterate(write_recipe(home), tmp_path / "run", gpus_per_model=1)


@pytest.mark.slow
def test_steps_side_by_side(cluster: RayCluster, home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(home, **CHAIN)
    stages: list[str] = []
    there = iterate(recipe, tmp_path / "there", cluster=cluster, stage=stages.append)
    here = iterate(recipe, tmp_path / "here")
    assert models(tmp_path / "there") == models(tmp_path / "here")
    assert left(tmp_path / "there") == left(tmp_path / "here")
    assert there.rows() == here.rows()
    assert [round_.losses for round_ in there.rounds] == [round_.losses for round_ in here.rounds]
    assert [*done(tmp_path / "there")] == [*done(tmp_path / "here")]
    assert "round 2/3, scoring, subtracting, tuning" in stages


@pytest.mark.slow
def test_a_killed_driver_goes_on(address: str, home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(home, **{**CHAIN, "bases": ["base", "target"]})
    run = tmp_path / "there"
    command = [sys.executable, "-m", "diffxfer", "iterate", str(recipe), "-o", str(run)]
    command += ["--ray", address]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    nodes.wait_until(lambda: (run / "state.json").exists() and len(done(run)) >= 2, 200)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    noted = len(done(run))
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    here = iterate(recipe, tmp_path / "here")
    assert report["steps_done"] == here.steps_done - noted
    assert report["rows"] == here.rows()
    assert models(run) == models(tmp_path / "here")
    assert left(run) == left(tmp_path / "here")


COUNTS = """
import ray, shutil, sys
ray.init(log_to_driver=False)
print(len([node for node in ray.nodes() if node["Alive"]]), "nodes", flush=True)
if sys.argv[3] == sys.argv[4]:
    sys.exit("fails on purpose")
shutil.copytree(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_command_may_use_the_cluster(cluster: RayCluster, home: Path, tmp_path: Path) -> None:
    (home / "counts.py").write_text(COUNTS)

    def follow(run: Path, fails: int) -> None:
        program = shlex.join([sys.executable, "counts.py"])
        command = f"{program} {{model}} {{output}} {{round}} {fails}"
        train = {"train": {"command": command}, "controls": ["direct"]}
        iterate(write_recipe(home, **train), run, cluster=cluster)

    follow(tmp_path / "run", 0)
    for name in ("round-02/model", "round-02/direct", "round-03/model", "round-03/direct"):
        assert "2 nodes" in (tmp_path / "run" / f"{name}.log").read_text()
    failing = tmp_path / "failing"
    with pytest.raises(TrainingError, match="its last output line is: fails on purpose"):
        follow(failing, 3)
    # What comes before the failure in the plan is done, as on one machine.
    before = ["round-01/diff", "round-02/graft", "round-02/model", "round-02/direct"]
    before += ["round-02/diff", "round-03/graft"]
    assert set(before) <= done(failing).keys()
