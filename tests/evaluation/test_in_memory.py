"""Grafts scored from memory and from a folder: the same scores, files and keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import Evaluation, evaluate, extract_diff
from diffxfer.errors import DiskSpaceError
from diffxfer.family import family_folder

if TYPE_CHECKING:
    from pathlib import Path

FAMILY = family_folder()
TARGET = FAMILY / "target"
TASKS = ["pig_latin", "pig_latin_choice", "docstrings"]
QUICK: dict[str, Any] = {
    "include_path": FAMILY / "tasks",
    "device": "cpu",
    "batch_size": 4,
    "limit": 3,
    "alpha": 0.75,
}
FOLDER = {"model_args": "revision=main"}
"""An option that needs a folder, and changes nothing."""
VOLATILE = {"date", "start_time", "end_time", "total_evaluation_time_seconds", "diffxfer"}


@pytest.fixture(scope="module")
def diff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "diff"
    extract_diff(FAMILY / "finetuned", FAMILY / "base", folder)
    return folder


def results_of(output: Path) -> dict[str, Any]:
    """lm-eval's results of the graft, without times and our keys."""
    (path,) = output.glob("*+0.75/results_*.json")
    found = json.loads(path.read_text())
    for config in found["configs"].values():
        config["metadata"].pop("revision", None)  # lm-eval records the backend's arguments here
    return {key: value for key, value in found.items() if key not in VOLATILE}


def samples_of(output: Path, task: str) -> list[Any]:
    (path,) = output.glob(f"*+0.75/samples_{task}_2*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "how",
    [
        {"apply_chat_template": True},
        {"dtype": "float32", "batch_size": 2},
        # It tries batches from large to small: 15 s on a CPU.
        pytest.param({"dtype": "float32", "batch_size": "auto"}, marks=pytest.mark.slow),
        {"backend": "huggingface", "dtype": "bfloat16"},
    ],
)
def test_scores_and_files_are_those_of_a_folder(
    diff: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    settings = {**QUICK, **how, "diff": diff, "tasks": TASKS}
    memory = evaluate(TARGET, **settings, output=tmp_path / "memory")
    folder = evaluate(TARGET, **settings, **FOLDER, output=tmp_path / "folder")
    assert memory.rows == folder.rows  # with the content hash of the graft
    assert results_of(tmp_path / "memory") == results_of(tmp_path / "folder")
    for task in TASKS:
        assert samples_of(tmp_path / "memory", task) == samples_of(tmp_path / "folder", task)


def test_arguments_of_the_backend_are_passed_on(diff: Path) -> None:
    settings = {**QUICK, "diff": diff, "tasks": "docstrings"}

    def score_of(found: Evaluation) -> list[float]:
        return [row.value for row in found.rows if row.alpha is not None]

    args = "prefix_token_id=5,attn_implementation=eager"
    short = score_of(evaluate(TARGET, **settings, model_args=args))
    folder = score_of(evaluate(TARGET, **settings, model_args=f"{args},revision=main"))
    assert short == folder
    assert short != score_of(evaluate(TARGET, **settings))


def test_no_weights_are_written(
    diff: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffxfer.diffs.jobs.job.free_bytes", lambda _: 1)
    settings = {**QUICK, "diff": diff, "tasks": "pig_latin", "output": tmp_path / "out"}
    with pytest.raises(DiskSpaceError, match="a graft needs"):
        evaluate(TARGET, **settings, **FOLDER)
    moved: list[tuple[int, int]] = []
    found = evaluate(TARGET, **settings, moved=lambda *bytes_: moved.append(bytes_))
    assert any(row.alpha == 0.75 for row in found.rows)
    assert moved
    assert moved[-1][0] == moved[-1][1]
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").glob(".diffxfer-scratch-*"))
