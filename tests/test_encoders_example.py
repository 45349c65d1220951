"""The example with encoders, in its smallest form, and its tables."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.family import family_folder
from tests.example_scripts import import_example

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def example() -> Any:
    return import_example("encoders", "run_encoders")


@pytest.mark.slow
def test_one_step_of_everything(example: Any, tmp_path: Path) -> None:
    """Every part of the run is there, and a second call does nothing again."""
    plan = example.Plan(
        words=300,
        reading=(1, 1, 1, 1),
        rows=(("few", 2), ("all", 4)),
        steps=(("few", 1), ("all", 2)),
        short_steps=(1,),
        questions=1,
        seeds=(0,),
    )
    text = (family_folder() / "text.txt").read_text("utf-8").split("\n\n")
    texts = [part for part in text if len(part) >= 80]
    kinds = {base: example.pieces(texts[:8]) for base in example.KINDS}
    parts = [part for part in map(import_module("texts").prose, texts) if len(part) >= 20]
    task = {name: parts[5 * i : 5 * i + 5] for i, name in enumerate(example.CLASSES)}
    rows = example.run(tmp_path / "work", plan, kinds, task, 1)
    found = {(row["run"], row["base"], row["stage"]) for row in rows}
    arms = set(example.ARMS) | {"graft", "tuned"}
    for run, base in (
        *(("all-m2", "m2"), ("all-m4", "m4"), ("few-m4", "m4"), ("all-m2-1", "m2")),
        *(("few-chain", base) for base in ("m2", "m3", "m4")),
    ):
        assert {stage for r, b, stage in found if (r, b) == (run, base)} == arms
    # The base is the same in both, and so is what is learned from it alone.
    path = tmp_path / "work" / "seed-0"
    plain = [
        (path / name / "direct" / "model.safetensors").read_bytes()
        for name in ("few-m4/round-02", "few-chain/round-04")
    ]
    assert plain[0] == plain[1]
    assert json.loads((tmp_path / "work" / "results.json").read_text())["rows"] == rows
    assert example.run(tmp_path / "work", plan, kinds, task, 1) == rows
    assert "| few, `m1` → `m4`, 1 |" in example.tables(rows)


def test_differences_are_paired_by_seed(example: Any) -> None:
    known = {"run": "few-m4", "steps": 80, "base": "m4", "round": 2}
    rows = [
        {**known, "stage": stage, "seed": seed, "value": value, "p_value": p_value}
        for stage, values in (
            *((arm, (0.1, 0.2, 0.3)) for arm in ("graft", "direct", "initialised", "distilled")),
            ("tuned", (0.2, 0.3, 0.5)),
        )
        for seed, (value, p_value) in enumerate(zip(values, (0.01, 0.2, None), strict=True))
    ]
    table = example.tables(rows)
    # A standard deviation of 10 % over the root of 3, and 4.303 times that of the differences.
    assert "| 20.0 ± 5.8 |" in table
    assert "| +13.3 ± 14.3 (1 of 3) | +13.3 ± 14.3 |" in table


@pytest.mark.usefixtures("example")
def test_prose_that_tells_its_package_is_left_out() -> None:
    texts = import_module("texts")
    sorting = "Sort the values along the last axis, in ascending order, and in place."
    assert texts.prose(f"{sorting}\n\nParameters\n----------\nx : int\n") == sorting
    assert texts.prose(f"{sorting}\n\n>>> sort()\n1") == sorting
    other = sorting.replace("last", "first")
    given = {"numpy": [sorting, other], "pandas": [sorting, f"{other} As NumPy does."]}
    assert texts.labelled(given) == {"numpy": [other], "pandas": []}
