"""`diffxfer eval` and `diffxfer demo` as a person or a script uses them."""

from __future__ import annotations

import json
import re
import signal
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.cli.test_console import on_a_terminal
from tests.evaluation.conftest import FAMILY

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.hub.forks import Forks

TARGET, DIRECT = FAMILY / "target", FAMILY / "direct"
QUICK = ("--device", "cpu", "--dtype", "float32", "--batch-size", "64")


class Run(Protocol):
    def __call__(
        self, *argv: str | Path, **environment: str
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def run(warm: Forks, tmp_path: Path) -> Run:
    """Runs a command in a separate process, with its own stdout and stderr."""
    return lambda *argv, **environment: warm.run(*argv, cwd=tmp_path, env=environment)


def test_json_is_all_that_is_on_stdout(run: Run, own_tasks: Path, diff: Path) -> None:
    done = run(
        *("eval", TARGET, "--finetuned", DIRECT, "--diff", diff, "--alpha", "0.5,1.0", *QUICK),
        *("--tasks", "written,chosen", "--include-path", own_tasks, "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "hello from the task's own code" not in done.stderr
    assert "and from below Python" not in done.stderr
    fields = ("model", "alpha", "task", "metric", "filter", "value", "stderr", "n")
    fields += ("baseline", "delta", "p_value", "recovered")
    assert all(set(fields) <= row.keys() for row in found["rows"])
    order = [(row["model"], row["alpha"], row["task"]) for row in found["rows"]]
    models = [(str(TARGET), None), (str(TARGET), 0.5), (str(TARGET), 1.0), (str(DIRECT), None)]
    assert order == [(*model, task) for model in models for task in ("written", "chosen")]
    graft = next(row for row in found["rows"] if row["alpha"] == 1.0 and row["task"] == "written")
    assert (graft["value"], graft["recovered"]) == (1.0, 1.0)


def test_the_table_is_on_stdout_and_talk_on_stderr(run: Run, own_tasks: Path, diff: Path) -> None:
    done = run(
        *("eval", TARGET, "--diff", diff, "--alpha", "0.5,1.0", "--tasks", "written", *QUICK),
        *("--include-path", own_tasks),
    )
    assert done.returncode == 0, done.stderr
    assert "0.0000" in done.stdout
    assert "1.0000" in done.stdout
    assert done.stdout.splitlines()[-1].strip().startswith("diffxfer apply ")
    assert "hello" not in done.stdout
    assert f"scoring {TARGET} (1 of 3) on written" in done.stderr


def test_what_libraries_print_is_in_the_log_alone(
    run: Run, own_tasks: Path, tmp_path: Path
) -> None:
    argv = ("eval", TARGET, "--tasks", "written", "--include-path", own_tasks, *QUICK)
    output = tmp_path / "scores"
    done = run(*argv, "-o", output, GIT_CEILING_DIRECTORIES="/", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == [
        *("loading", "hashing", "scoring")
    ]
    log = (output / "diffxfer.log").read_text()
    assert log.startswith("$ diffxfer eval ")
    for said in ("hello from the task's own code", "and from below Python", "Loading weights"):
        assert said in log
    assert not list(tmp_path.glob("diffxfer-*.log"))


def test_a_terminal_shows_one_bar_of_ours(own_tasks: Path) -> None:
    status, written = on_a_terminal(
        *("eval", str(TARGET), "--tasks", "written", "--include-path", str(own_tasks), *QUICK),
        columns=80,
    )
    assert status == 0, written
    assert "scoring: target (1/1)" in written
    assert "/3 requests" in written
    for theirs in ("Loading weights", "generate_until", "hello", "from below", "it/s", "fatal"):
        assert theirs not in written


def test_debug_shows_what_libraries_print(run: Run, own_tasks: Path, tmp_path: Path) -> None:
    argv = ("eval", TARGET, "--tasks", "written", "--include-path", own_tasks, *QUICK)
    done = run(*argv, DIFFXFER_DEBUG="1", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "hello" not in done.stdout
    assert "hello from the task's own code" in done.stderr
    assert "and from below Python" in done.stderr
    assert not list(tmp_path.glob("diffxfer-*.log"))


def test_quiet_leaves_the_result(run: Run, own_tasks: Path) -> None:
    tasks = ("--tasks", "written", "--include-path", own_tasks)
    done = run("eval", TARGET, *tasks, *QUICK, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "written" in done.stdout


def test_a_failure_keeps_what_was_scored(run: Run, own_tasks: Path, tmp_path: Path) -> None:
    # Half of the second model's only shard: its header is sound, so it fails when it is loaded.
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in DIRECT.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "no such thing"}))
    argv = ("eval", TARGET, broken, "--tasks", "written", "--include-path", own_tasks, *QUICK)
    done = run(*argv, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "written" in done.stdout
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: {broken}: lm-eval could not score it (")
    assert "Traceback" not in done.stderr
    [log] = tmp_path.glob("diffxfer-*.log")
    assert said.endswith(f"; the output of its libraries is in {log}")
    assert "hello from the task's own code" in log.read_text()
    assert "Traceback" in log.read_text()
    as_json = run(*argv, "--json", "-o", tmp_path / "scores")
    found = json.loads(as_json.stdout)
    assert [row["model"] for row in found["rows"]] == [str(TARGET)]
    assert found["error"]["type"] == "EvaluationError"
    assert found["error"]["log"] == str(tmp_path / "scores" / "diffxfer.log")
    assert "no such thing" in (tmp_path / "scores" / "diffxfer.log").read_text()


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--tasks", ""], 2, "error: --tasks: names no task"),
        (["--tasks", "written", "--alpha", "much"], 2, "'much' is not a number"),
        (["--tasks", "written", "--batch-size", "0"], 2, "error: --batch-size"),
        (["--tasks", "written", "--apply-chat-template"], 1, "has no chat template"),
        (["--tasks", "written", "--device", "cuda:99"], 1, "error: --device: cuda:99"),
    ],
)
def test_errors_are_one_line(
    run: Run, own_tasks: Path, argv: list[str], status: int, said: str
) -> None:
    done = run("eval", TARGET, *argv, "--include-path", own_tasks, "--quiet")
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_what_is_kept(warm: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = warm.run(
        *("eval", TARGET, DIRECT, "--batch-size", "1", "--device", "cpu", "--limit", "20"),
        *("--tasks", "pig_latin", "--include-path", FAMILY / "tasks", "-o", output),
        cwd=tmp_path,
        env={},
        stop=(output, "*/results_*.json", signal.SIGINT),
    )
    assert done.returncode == 130
    assert "pig_latin" in done.stdout
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"interrupted: finished scores are kept in {output}")


@pytest.mark.slow  # .ci/run gives the demo itself
def test_the_demo_tells_the_whole_story_and_keeps_it(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "demo"
    done = run("demo", "--keep", kept, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for part in ("$ diffxfer extract", "$ diffxfer apply", "$ diffxfer eval", "On your own models"):
        assert part in done.stdout
    assert re.search(r"target \+ 1.0·Δ", done.stdout)
    assert "0.9850" in done.stdout
    assert str(tmp_path) not in done.stdout.replace(str(kept), "")
    assert {path.name for path in kept.iterdir()} == {"diff", "grafted", "scores"}
    assert (kept / "scores" / "comparison.json").exists()
    again = run("demo", "--keep", kept)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {kept}: exists already")
