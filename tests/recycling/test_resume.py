"""Interrupted runs, and runs in several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import transfer, tune
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.errors import OutputError, TrainingError, UnfinishedError
from diffxfer.recycling.training_workspace import TrainingWorkspace, quick_fingerprint
from tests import families
from tests.recycling.training import FAMILY, RATE, tune_shortly, write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.forks import Forks

pytest.importorskip("trl")

STEPS = 9
OPTIONS: dict[str, Any] = {"steps": STEPS, "save_every": 2, "batch_size": 8}

# Four steps are an epoch: the run is killed in its second one, with a state from there.
KILLED = """
import os, signal, sys
from diffxfer import transfer, tune
from diffxfer.recycling.training_workspace import TrainingWorkspace
model, data, out, teacher, when = sys.argv[1:]

def kill(done, *_):
    if f"after {done}" == when:
        os.kill(os.getpid(), signal.SIGKILL)

complete = TrainingWorkspace.mark_complete
def declare(self, folder):
    if f"before {folder.name} is complete" == when:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    complete(self, folder)

TrainingWorkspace.mark_complete = declare
tune(
    model, data, out, steps=9, save_every=2, batch_size=8, learning_rate=1e-3, device="cpu",
    teacher=teacher or None, progress=kill,
)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.mark.parametrize(
    ("when", "begun", "taught"),
    [
        ("after 7", 6, False),
        ("before checkpoint-6 is complete", 4, True),
        pytest.param("before checkpoint-9 is complete", 8, False, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    warm: Forks, when: str, begun: int, taught: bool, data: Path, tmp_path: Path
) -> None:
    model, teacher = FAMILY / "target", FAMILY / "finetuned" if taught else None
    out = tmp_path / "killed" / "out"
    argv = (model, data, out, teacher or "", when)
    done = warm.run_code(KILLED, *argv, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in out.parent.iterdir()] == [".out.tuning"]
    report = tune_shortly(model, data, out, teacher=teacher, **OPTIONS)
    assert report.continued_from == begun
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    whole = tune_shortly(model, data, tmp_path / "whole" / "out", teacher=teacher, **OPTIONS)
    assert whole.continued_from == 0
    assert report.log == whole.log
    assert families.contents(out) == families.contents(whole.output)


class StopError(Exception):
    """The exception that ends a run in the middle."""


def stop_after(step: int) -> Any:
    def progress(done: int, _total: int, _loss: float) -> None:
        if done == step:
            raise StopError

    return progress


class TestWhatIsLeft:
    @pytest.fixture
    def work(self, data: Path, tmp_path: Path) -> Path:
        """The workspace of a run that was stopped after its fifth step."""
        with pytest.raises(StopError):
            tune_shortly(
                FAMILY / "target", data, tmp_path / "out", **OPTIONS, progress=stop_after(5)
            )
        return tmp_path / ".out.tuning"

    def test_the_newest_state_alone(self, work: Path) -> None:
        assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-4"]
        assert not (work.parent / "out").exists()

    def test_another_run_is_refused(self, work: Path, data: Path) -> None:
        before = families.contents(work)
        changed: list[tuple[dict[str, Any], str]] = [
            ({"steps": 10}, "in which steps differs: 9 there, 10 here"),
            ({"learning_rate": 0.5}, "in which learning_rate differs: 0.001 there, 0.5 here"),
            ({"teacher": FAMILY / "finetuned"}, "in which teacher differs; "),
        ]
        for options, said in changed:
            with pytest.raises(UnfinishedError, match=said) as caught:
                tune_shortly(FAMILY / "target", data, work.parent / "out", **(OPTIONS | options))
            assert "--restart" in str(caught.value)
        with pytest.raises(UnfinishedError, match="in which model differs; "):
            tune_shortly(FAMILY / "base", data, work.parent / "out", **OPTIONS)
        assert families.contents(work) == before

    def test_how_often_states_are_saved_may_change(self, work: Path, data: Path) -> None:
        options = OPTIONS | {"save_every": 3}
        report = tune_shortly(FAMILY / "target", data, work.parent / "out", **options)
        assert report.continued_from == 4

    def test_restart(self, work: Path, data: Path) -> None:
        options = {**OPTIONS, "steps": 1, "restart": True}
        report = tune_shortly(FAMILY / "target", data, work.parent / "out", **options)
        assert (report.continued_from, report.steps) == (0, 1)
        assert not work.exists()

    def test_a_state_that_lost_a_file_does_not_count(self, work: Path, data: Path) -> None:
        (work / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
        report = tune_shortly(
            FAMILY / "target", data, work.parent / "out", **(OPTIONS | {"steps": 1})
        )
        assert report.continued_from == 0

    def test_a_folder_of_somebody_else(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / ".out.tuning").mkdir()
        (tmp_path / ".out.tuning" / "diary").write_text("dear")
        for restart in (False, True):
            with pytest.raises(TrainingError, match="is not the state of a diffxfer tune run"):
                tune_shortly(FAMILY / "target", data, tmp_path / "out", restart=restart)
        assert (tmp_path / ".out.tuning" / "diary").read_text() == "dear"

    def test_what_another_command_left_is_in_the_way(self, data: Path, tmp_path: Path) -> None:
        def stop(done: int, _total: int) -> None:
            if done:
                raise KeyboardInterrupt

        models = [FAMILY / name for name in ("finetuned", "base", "target")]
        with pytest.raises(KeyboardInterrupt):
            transfer(*models, tmp_path / "out", progress=stop)
        before = families.contents(tmp_path)
        steps: list[int] = []
        with pytest.raises(
            UnfinishedError, match="another command left an unfinished output there"
        ):
            tune_shortly(
                *(FAMILY / "target", data, tmp_path / "out"),
                progress=lambda done, *_: steps.append(done),
            )
        assert steps == []  # before the training, not after it
        assert families.contents(tmp_path) == before
        tune_shortly(FAMILY / "target", data, tmp_path / "out", steps=1, restart=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_run_that_goes_on(self, data: Path, tmp_path: Path) -> None:
        other = TrainingWorkspace(tmp_path / "out")
        other.open(
            {"model": quick_fingerprint(open_checkpoint(FAMILY / "base", "base"))}, restart=False
        )
        with pytest.raises(OutputError, match="is in use by another run"):
            tune_shortly(FAMILY / "target", data, tmp_path / "out")
        assert other.path.exists()
        other.close()
        assert not other.path.exists()


def launch_two(*argv: object) -> subprocess.CompletedProcess[str]:
    # Its --cpu would start one process; without a GPU, several compute on the CPU as well.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.run(
        [sys.executable, *launch, "-m", "diffxfer", "tune", *map(str, argv)],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.slow
@pytest.mark.parametrize("taught", [False, True])
def test_two_processes_are_as_one(taught: bool, data: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", str(FAMILY / "finetuned"), "--hidden-weight", "0.1"] if taught else []
    out = tmp_path / "made" / "out"
    argv = [FAMILY / "target", "--data", data, "-o", out, "--steps", 3, "--batch-size", 8]
    argv += ["--gradient-accumulation", 2, "--learning-rate", RATE, "--save-every", 2, "--json"]
    done = launch_two(*argv, *teacher)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # by one process
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.command["processes"] == 2
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    # All rows are in every step, so that only the order in which they are summed differs.
    options = {"teacher": FAMILY / "finetuned", "hidden_weight": 0.1} if taught else {}
    alone = tune(
        *(FAMILY / "target", data, tmp_path / "alone"),
        **{"steps": 3, "batch_size": 32, "learning_rate": RATE, "device": "cpu", **options},
    )
    for one, other in zip(printed["log"], alone.log, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert printed["steps"] == 3
    families.load_whole(out)


@pytest.mark.slow
def test_a_refusal_of_the_first_of_two_processes_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.tuning").mkdir()
    (tmp_path / ".out.tuning" / "diary").write_text("dear")
    argv = (FAMILY / "target", "--data", data, "-o", tmp_path / "out", "--steps", 1)
    done = launch_two(*argv)
    assert done.returncode == 1
    errors = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    # Each process adds the name of its own log if a library printed anything.
    told = sorted(line.partition("; the output of its libraries is in ")[0] for line in errors)
    said = f"{tmp_path / '.out.tuning'}: is not the state of a diffxfer tune run; move it elsewhere"
    assert told == [f"error: {said}", f"error: the first process failed: {said}"]
    # Tracebacks are the launcher's own, on processes that ended with a status.
    assert "diffxfer/recycling" not in done.stderr
    assert (tmp_path / ".out.tuning" / "diary").read_text() == "dear"
