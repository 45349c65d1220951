"""`diffxfer tune` as a person or a script uses it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests import tiny
from tests.recycling import encoders
from tests.recycling.training import FAMILY, write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.forks import Forks

pytest.importorskip("trl")


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data = write_rows(tmp_path / "train.jsonl")
    out = tmp_path / "out"
    return ["tune", *map(str, (FAMILY / "target", "--data", data, "-o", out, "--steps", 3))]


def test_a_log_of_steps_and_a_summary(argv: list[str], tmp_path: Path) -> None:
    outcome = tiny.run(*argv)
    assert (outcome.status, outcome.out) == (0, "")
    lines = outcome.err.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"step {n} of 3" for n in (1, 2, 3)]
    assert lines[3].startswith("steps: 3 on 32 rows; loss ")
    assert lines[4] == "tensors: 39 tuned"
    assert lines[5].startswith(f"wrote {tmp_path / 'out'}: 1.65 MB in ")
    assert len(lines) == 6


def test_quiet(argv: list[str]) -> None:
    assert tiny.run(*argv, "--quiet") == tiny.Outcome(0, "", "")


def test_what_was_cut_is_told_of_even_then(argv: list[str]) -> None:
    outcome = tiny.run(*argv, "-q", "--max-length", "14")
    assert outcome.err.startswith("warning: rows truncated to 14 tokens: ")


def test_json(argv: list[str], tmp_path: Path) -> None:
    outcome = tiny.run(*argv, "--json", "--quiet")
    assert (outcome.status, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found["command"] == "tune"
    assert found["output"] == str(tmp_path / "out")
    assert [entry["step"] for entry in found["log"]] == [1, 2, 3]
    assert found["tensors"] == {"tuned": 39}


def test_other_processes_say_nothing(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert tiny.run(*argv, "--json") == tiny.Outcome(0, "", "")


def test_an_error_is_one_line(argv: list[str], tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\n')
    outcome = tiny.run(*argv, "--json")
    assert outcome.status == 1
    assert outcome.err == (
        f"error: {tmp_path / 'train.jsonl'}: line 33 lacks 'completion', which the first row has;"
        " give all rows the same format\n"
    )
    assert json.loads(outcome.out)["error"]["type"] == "DataError"
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_failure_names_the_log_beside_the_output(
    warm: Forks, argv: list[str], tmp_path: Path
) -> None:
    # A separate process: transformers keeps the stderr that it was imported under.
    outcome = warm.run(*argv, "--learning-rate", "1e38", cwd=tmp_path, env={})
    assert outcome.returncode == 1
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: the loss is nan at step 2; give a smaller --learning-rate")
    assert last.endswith(f"; the output of its libraries is in {tmp_path / 'out.log'}")
    assert "***** Running training *****" in (tmp_path / "out.log").read_text()
    assert tiny.run(*argv).status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "out"}


def test_a_new_head_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = encoders.save("masked", tmp_path / "model")
    data = encoders.labelled(tmp_path / "rows.jsonl")
    argv = ["tune", *map(str, (model, "--data", data, "--steps", 1, "--seed", 4, "-o"))]
    outcome = tiny.run(*argv, str(tmp_path / "out"), "--objective", "classification")
    assert outcome.status == 0, outcome
    lines = outcome.err.splitlines()
    said = "the classification head is new, made from seed 4; its labels are cold, hot, mild"
    assert lines[1] == "objective: classification"
    assert lines[3:5] == [said, "tensors: 41 tuned, 5 left out"]
    outcome = tiny.run(*argv, str(tmp_path / "other"), "--json", "--quiet")
    found = json.loads(outcome.out)
    assert (found["objective"], found["notes"]) == ("classification", [said])
