"""Chains of encoders: the four arms of Qin et al. 2023, and heads that bases lack."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from diffxfer import iterate
from diffxfer.errors import DataError, DiffxferError, RecipeError
from tests.recycling.encoders import LABELS, labelled, plain, save, tune_shortly, write

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.recycling.chain_report import ChainReport

TASK = """\
task: temperature
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: {labels}
metric_list: [{{metric: acc}}]
"""
TRAIN: dict[str, Any] = {
    "data": "rows.jsonl",
    "objective": "classification",
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "warmup": 0.0,
    "device": "cpu",
}
EVAL: dict[str, Any] = {
    "tasks": ["temperature"],
    "include_path": "tasks",
    "backend": "classifier",
    "batch_size": 8,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, the second with more MLM training, rows and a task."""
    folder = tmp_path_factory.mktemp("encoders")
    save("masked", folder / "m1")
    tune_shortly(folder / "m1", plain(folder / "texts.jsonl"), folder / "m2", objective="mlm")
    rows = labelled(folder / "rows.jsonl")
    (folder / "tasks").mkdir()
    text = TASK.format(rows=rows, labels=json.dumps(list(LABELS)))
    (folder / "tasks" / "temperature.yaml").write_text(text)
    return folder


def follow(home: Path, run: Path, **changes: Any) -> ChainReport:
    recipe = {"bases": ["m1", "m2"], "train": TRAIN, "eval": EVAL, **changes}
    path = home / f"{run.parent.name}.json"
    path.write_text(json.dumps({k: v for k, v in recipe.items() if v is not None}))
    return iterate(path, run)


@pytest.fixture(scope="module")
def arms(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ChainReport]:
    """A run of the four arms."""
    run = tmp_path_factory.mktemp("arms") / "run"
    train = {**TRAIN, "teacher": "previous"}
    report = follow(home, run, train=train, controls=["direct", "initialised", "distilled"])
    return run, report


def test_the_graft_is_the_sum_with_the_head(home: Path, arms: tuple[Path, ChainReport]) -> None:
    run, _ = arms
    base, tuned, target, graft = (
        load_file(folder / "model.safetensors")
        for folder in (
            *(home / "m1", run / "round-01" / "model"),
            *(home / "m2", run / "round-02" / "graft"),
        )
    )
    assert graft.keys() == tuned.keys()
    heads = {name for name in graft if name.startswith("classifier.")}
    assert len(heads) == 4
    moved = 0
    for name, tensor in graft.items():
        if name in heads:
            assert torch.equal(tensor, tuned[name])
            continue
        delta = tuned[name].double() - base[name].double()
        assert torch.equal(tensor, (target[name].double() + delta).float()), name
        moved += not torch.equal(tensor, target[name])
    assert moved > 10
    config = json.loads((run / "round-02" / "graft" / "config.json").read_text())
    assert [config["id2label"][str(number)] for number in range(3)] == list(LABELS)


def test_each_arm_is_the_tuning_that_it_says(
    home: Path, arms: tuple[Path, ChainReport], tmp_path: Path
) -> None:
    run, _ = arms
    outdated, graft = run / "round-01" / "model", run / "round-02" / "graft"
    expected = {
        "model": (graft, outdated),
        "direct": (home / "m2", None),
        "initialised": (graft, None),
        "distilled": (home / "m2", outdated),
    }
    written = set()
    for name, (start, teacher) in expected.items():
        made = tmp_path / name
        tune_shortly(start, home / "rows.jsonl", made, objective="classification", teacher=teacher)
        weights = (made / "model.safetensors").read_bytes()
        assert weights == (run / "round-02" / name / "model.safetensors").read_bytes()
        written.add(weights)
    assert len(written) == 4


def test_the_arms_are_scored_against_plain_tuning(
    home: Path, arms: tuple[Path, ChainReport]
) -> None:
    run, report = arms
    stages = ["graft", "tuned", "direct", "initialised", "distilled"]
    first, second = report.rounds
    assert list(first.scores) == ["tuned"]
    assert report.columns() == stages
    assert {row["stage"] for row in report.rows() if row["alpha"] == 1.0} == {
        *("graft", "tuned", "initialised")
    }
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    folders = {"tuned": "model"}
    for stage in stages:
        [row] = second.scores[stage]
        assert row["baseline"] == "direct"
        assert (row["delta"] is None) == (stage == "direct")
        answers = _argmax(run / "round-02" / folders.get(stage, stage), rows)
        right = sum(a == row["label"] for a, row in zip(answers, rows, strict=True))
        assert row["value"] == pytest.approx(right / len(rows))
    assert second.losses.keys() == {"model", "direct", "initialised", "distilled"}
    page = (run / "report.html").read_text()
    assert "base, tuned with the teacher" in page


def _argmax(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [
            model(tokenizer(row["text"], return_tensors="pt")["input_ids"]).logits for row in rows
        ]
    return [model.config.id2label[int(each.argmax())] for each in logits]


def test_controls_go_when_only_the_last_model_is_kept(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = {**TRAIN, "steps": 1, "teacher": "previous"}
    controls = ["direct", "initialised", "distilled"]
    follow(home, run, train=train, controls=controls, keep="last", eval=None)
    assert {path.name for path in run.glob("round-*/*")} == {"model"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "controls: has base, but {home}/m1 has no classification head to score"),
    (
        {"controls": [], "eval": {**EVAL, "backend": "hf"}},
        "eval.backend: is hf, which scores language models, but the chain makes classifiers",
    ),
    (
        {"controls": ["distilled"]},
        "the control distilled compares training with and without a teacher, which requires",
    ),
    (
        {"controls": ["initialised"], "train": None, "finetuned": "sft"},
        "the control initialised compares training with and without a teacher, which requires",
    ),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_scored_is_refused_before_anything_runs(
    changes: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        follow(home, tmp_path / "run", **changes)
    message = str(caught.value)
    assert said.format(home=home) in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_rows_of_other_labels_are_refused_before_anything_runs(home: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    other = write(
        tmp_path / "other.jsonl", [{**row, "label": f"very {row['label']}"} for row in rows]
    )
    tune_shortly(home / "m1", home / "rows.jsonl", tmp_path / "sft", objective="classification")
    given = {"finetuned": str(tmp_path / "sft"), "controls": []}
    with pytest.raises(DataError) as caught:
        follow(home, tmp_path / "run", train={**TRAIN, "data": str(other)}, **given)
    assert str(caught.value) == (
        f"{other.name}: has the labels 'very cold', 'very hot', 'very mild', of which"
        f" {tmp_path}/sft lacks 'very cold', 'very hot', 'very mild': it has"
        " 'cold', 'hot', 'mild'; give rows with its labels"
    )
    assert not (tmp_path / "run").exists()


def test_an_added_head_may_be_refused(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = home / "rows.jsonl"
    tune_shortly(home / "m1", rows, tmp_path / "sft", objective="classification")
    given = {"finetuned": str(tmp_path / "sft"), "train": None, "eval": None}
    with pytest.raises(DiffxferError) as caught:
        follow(home, run, added="refuse", **given)
    message = str(caught.value)
    assert "classifier.dense.weight" in message
    assert "added: bring" in message
    follow(home, run, added="drop", **given)
    graft = load_file(run / "round-02" / "graft" / "model.safetensors")
    assert not any(name.startswith("classifier.") for name in graft)
    shutil.rmtree(run)
    follow(home, run, **given)
    graft = load_file(run / "round-02" / "graft" / "model.safetensors")
    assert "classifier.dense.weight" in graft
