"""Chains that are killed at every kind of step resume to the same models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import iterate
from tests import families
from tests.recycling.chains import EVAL, TRAIN, left, make_home, models, write_recipe

if TYPE_CHECKING:
    from tests.hub.forks import Forks

pytest.importorskip("trl")

# Killed in the middle of a step, at its beginning, or just before or after it is noted.
KILLED = """
import os, signal, sys
from diffxfer import iterate
from diffxfer.recycling.chain_state import ChainState
recipe, run, when, where = sys.argv[1:]
seen = []

def die(kind):
    if kind == when and any(where in line for line in seen[-1:]):
        os.kill(os.getpid(), signal.SIGKILL)

def say(line):
    seen.append(line)
    die("at the beginning of")

def moved(done, total):
    if 0 < done:
        die("in the middle of")

def training(done, total, loss):
    if done == 2:
        die("in the middle of")

record = ChainState.record
def noted(self, key, found):
    if key == where and when == "before noting":
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, key, found)
    if key == where and when == "after noting":
        os.kill(os.getpid(), signal.SIGKILL)
ChainState.record = noted

iterate(recipe, run, progress=say, moved=moved, training=training)
"""

SHORT: dict[str, Any] = {"train": {**TRAIN, "steps": 3, "save_every": 1}, "keep": "models"}
SCORED: dict[str, Any] = {
    "bases": ["base", "target"],
    "train": None,
    "alpha": [0.9, 1.2],
    "eval": {**EVAL, "limit": 4},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("kills") / "home")


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The undisturbed runs, by name."""
    root = tmp_path_factory.mktemp("undisturbed")
    iterate(write_recipe(home, **SHORT), root / "short")
    return {"short": root / "short"}


def kill(warm: Forks, home: Path, run: Path, when: str, where: str) -> None:
    done = warm.run_code(KILLED, home / "chain.yaml", run, when, where, cwd=home)
    assert done.returncode == -signal.SIGKILL, done.stderr


def steps_noted(run: Path) -> int:
    return len(json.loads((run / "state.json").read_text())["done"])


def results(run: Path) -> set[Path]:
    """The files of scores, one per evaluation."""
    return set(run.glob("round-*/scores/*/results_*.json"))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("when", "where", "noted"),
    [
        ("in the middle of", "tuning round-03/graft", 5),
        pytest.param("in the middle of", "subtracting round-02/model", 3, marks=slow),
        pytest.param("in the middle of", "grafting on newest", 4, marks=slow),
        pytest.param("before noting", "round-01/diff", 0, marks=slow),
        pytest.param("before noting", "round-02/graft", 1, marks=slow),
        pytest.param("before noting", "round-02/model", 2, marks=slow),
        # The killed run has not removed unneeded folders; the next run does.
        pytest.param("after noting", "round-03/model", 6, marks=slow),
    ],
)
def test_a_chain_goes_on_to_the_same_models(
    warm: Forks,
    when: str,
    where: str,
    noted: int,
    home: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(home, **SHORT)
    kill(warm, home, run, when, where)
    assert steps_noted(run) == noted
    before = (run / "state.json").stat().st_mtime_ns
    report = iterate(recipe, run)
    assert report.steps_done == 6 - noted
    assert ((run / "state.json").stat().st_mtime_ns == before) == (noted == 6)
    whole = undisturbed["short"]
    assert models(run) == models(whole)
    assert left(run) == left(whole) == {"round-02/model", "round-03/model"}
    known, other = (json.loads((path / "state.json").read_text()) for path in (run, whole))
    assert known == other, "the losses too are those of one run"


@slow
@pytest.mark.parametrize(
    ("where", "noted"),
    [
        ("scoring base, finetuned", 0),
        ("choosing alpha for target", 2),
        ("(2 of 3)", 2),
        ("scoring target, round-02/graft", 4),
        ("(2 of 2)", 0),
    ],
)
def test_scores_are_not_made_twice(
    warm: Forks, where: str, noted: int, home: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    recipe = write_recipe(home, **SCORED)
    kill(warm, home, run, "at the beginning of", where)
    assert steps_noted(run) == noted if (run / "state.json").exists() else noted == 0
    scored = results(run)
    iterate(recipe, run)
    assert iterate(recipe, whole).rounds == iterate(recipe, run).rounds
    assert models(run) == models(whole)
    assert scored <= results(run)
    assert len(results(run)) == len(results(whole))
    assert not list(run.glob("round-*/scores/.*"))


# The trainer of somebody: it kills the run that began it the first time, or waits.
TRAINER = """
import os, shutil, signal, sys, time
from pathlib import Path
model, output, how = sys.argv[1:]
print("training", model, flush=True)
first = not Path("begun").exists()
Path("begun").touch()
if how == "kill" and first:
    os.kill(os.getppid(), signal.SIGKILL)
if how == "outlive" and first:
    os.kill(os.getppid(), signal.SIGKILL)
    while not Path("end").exists():
        time.sleep(0.05)
shutil.copytree(model, output)
"""


@pytest.mark.parametrize("how", ["kill", "outlive"])
def test_a_command_whose_run_was_killed(how: str, tmp_path: Path) -> None:
    home, run = make_home(tmp_path / "home"), tmp_path / "run"
    (home / "trainer.py").write_text(TRAINER)
    command = f"{sys.executable} trainer.py {{model}} {{output}} {how}"
    recipe = write_recipe(home, bases=["base", "target"], train={"command": command})
    argv = [sys.executable, "-m", "diffxfer", "iterate", recipe, "-o", run]
    done = subprocess.run(list(map(str, argv)), check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if how == "outlive":
        again = subprocess.run(list(map(str, argv)), check=False, capture_output=True, text=True)
        assert again.returncode == 1
        assert "is still running for a run that was killed; terminate it, or wait" in again.stderr
        (home / "end").touch()
    for _ in range(100):  # it is dying, or copying
        again = subprocess.run(list(map(str, argv)), check=False, capture_output=True, text=True)
        if "is still running" not in again.stderr:
            break
        time.sleep(0.1)
    assert again.returncode == 0, again.stderr
    assert models(run)["round-02/model"] == models(run)["round-02/graft"]
    assert left(run) == {
        *("round-01/diff", "round-02/graft", "round-02/model", "round-02/model.log")
    }
    assert (run / "round-02/model.log").read_text().count("training") == 2


STUBBORN = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path("child").write_text(str(child.pid))
Path("ready").touch()
time.sleep(60)
"""


def test_ctrl_c_ends_a_command_with_all_that_it_started(tmp_path: Path) -> None:
    home, run = make_home(tmp_path / "home"), tmp_path / "run"
    (home / "trainer.py").write_text(STUBBORN)
    command = f"{sys.executable} trainer.py {{model}} {{output}}"
    recipe = write_recipe(home, bases=["base", "target"], train={"command": command})
    patient = "import diffxfer.recycling.training_command as c; c._PATIENCE_S = 0.5; "
    started = f"{patient}from diffxfer.cli.main import main; main()"
    argv = [sys.executable, "-c", started, "iterate", recipe, "-o", run]
    process = subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (home / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        "interrupted: finished steps are kept, and the same command continues from there"
    )
    child = int((home / "child").read_text())
    until = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < until, "it outlived the run"
        time.sleep(0.05)
    families.load_whole(run / "round-02" / "graft")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
