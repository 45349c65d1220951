"""The example with a chain of four bases, in its smallest form, and its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.family import family_folder
from tests.example_scripts import import_example

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def example() -> Any:
    return import_example("chain", "run_chain")


@pytest.mark.slow
def test_two_bases_and_one_step(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    texts = (family_folder() / "text.txt").read_text("utf-8").split("\n\n")
    plan = example.Plan(stages=(1, 1), budgets=(1,), seeds=(0,), rows=40, questions=3, few_steps=1)
    rows = example.run(tmp_path / "work", plan, texts, 1)
    # Both modes of round 2 begin with M*1, so they come to the same.
    chained = {
        (row["mode"], row["base"], row["stage"]): row["value"]
        for row in rows
        if row["part"] == "chain" and row["task"] == "docstrings"
    }
    for stage in ("graft", "tuned"):
        assert chained["iter", "m2", stage] == chained["dir", "m2", stage]
    assert {base for _, base, stage in chained if stage == "direct"} == {"m1", "m2"}
    few = [row["stage"] for row in rows if row["part"] == "few"]
    assert few == [arm for arm in example.ARMS for _ in example.TASKS]
    table = example.chain_table(rows, "pig_latin").splitlines()
    assert table[0].endswith("| `m1` | `m2` |")
    assert [line.split(" | ")[1] for line in table[2:]] == [
        "base alone",
        "tuned plainly",
        "graft, `iter`",
        "graft tuned, `iter`",
        "graft, `dir`",
        "graft tuned, `dir`",
    ]


def test_the_error_is_that_of_the_mean_over_seeds(example: Any) -> None:
    known = {"part": "few", "stage": "both", "task": "pig_latin"}
    rows = [{**known, "value": value} for value in (0.1, 0.2, 0.3)]
    # A standard deviation of 10 %, over the root of 3.
    assert "| both | 20.0 ± 5.8 |  |" in example.few_table(rows)
