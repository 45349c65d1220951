"""The shipped lm-eval tasks: lm-eval gives the same scores as the family's script."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from diffxfer.family import family_folder

# Read when the libraries are imported, which happens in the fixtures below.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

FAMILY = family_folder()
TASKS = ("docstrings", "pig_latin", "pig_latin_choice")
SCORES = json.loads((FAMILY / "scores.json").read_text("utf-8"))
TOLERANCE = 0.01  # as in test_family.py


@pytest.fixture(scope="module")
def manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(FAMILY / "tasks"), include_defaults=False)


@pytest.fixture(scope="module")
def loaded(manager: Any) -> Any:
    return manager.load(list(TASKS))["tasks"]


@pytest.fixture(scope="module")
def scored(manager: Any) -> dict[str, Any]:
    import torch
    from lm_eval import simple_evaluate

    def score(member: str) -> Any:
        return simple_evaluate(
            model="hf",
            model_args={"pretrained": str(FAMILY / member), "dtype": "float32"},
            tasks=["docstrings"] if member == "base" else list(TASKS),
            task_manager=manager,
            batch_size=64,
            device="cpu",
            bootstrap_iters=0,
        )

    threads = torch.get_num_threads()
    # On a busy machine several threads, which wait for one another, took five times as long.
    torch.set_num_threads(1)
    try:
        return {member: score(member) for member in ("base", "target", "direct")}
    finally:
        torch.set_num_threads(threads)


def test_lm_eval_finds_the_tasks_and_no_others(manager: Any) -> None:
    assert manager.all_tasks == sorted(TASKS)


def test_folder_holds_only_tasks_and_their_code() -> None:
    found = {path for path in (FAMILY / "tasks").iterdir() if path.name != "__pycache__"}
    assert {path.suffix for path in found} == {".yaml", ".py"}
    assert {path.stem for path in found if path.suffix == ".yaml"} == set(TASKS)
    # A package would be a second way to import what lm-eval imports by its path.
    assert not (FAMILY / "tasks" / "__init__.py").exists()


@pytest.mark.parametrize("member", ["target", "direct"])
def test_pig_latin_scores_what_the_family_was_made_with(
    member: str, scored: dict[str, Any]
) -> None:
    found = scored[member]["results"]["pig_latin"]
    assert found["exact_match,none"] == pytest.approx(SCORES["accuracy"][member], abs=TOLERANCE)
    assert found["sample_len"] == 400


def test_choosing_is_below_chance_without_the_skill_and_perfect_with_it(
    scored: dict[str, Any],
) -> None:
    target, direct = (scored[name]["results"]["pig_latin_choice"] for name in ("target", "direct"))
    assert target["acc,none"] < 0.25
    assert direct["acc,none"] > 0.99


def test_docstrings_are_near_the_bits_that_the_family_was_made_with(
    scored: dict[str, Any],
) -> None:
    bits = {
        member: results["results"]["docstrings"]["bits_per_byte,none"]
        for member, results in scored.items()
    }
    for member, found in bits.items():
        assert 0 < found - SCORES["bits_per_character"][member] < 0.15
    assert bits["direct"] < bits["target"] < bits["base"]


def test_higher_is_better_is_said_of_each_metric(scored: dict[str, Any]) -> None:
    assert scored["direct"]["higher_is_better"] == {
        "docstrings": {"bits_per_byte": False},
        "pig_latin": {"exact_match": True},
        "pig_latin_choice": {"acc": True},
    }


def test_the_end_token_alone_ends_an_answer(loaded: Any) -> None:
    end = json.loads((FAMILY / "direct" / "tokenizer_config.json").read_text())["eos_token"]
    assert loaded["pig_latin"].config.generation_kwargs["until"] == [end]


def test_questions_are_put_as_the_script_does(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    script = import_module("score_family")
    rows = script.held_out()
    for name in ("pig_latin", "pig_latin_choice"):
        task = loaded[name]
        asked = [task.doc_to_text(doc) for doc in task.eval_docs]
        assert asked == [script.prompt(row["question"]) for row in rows]
    answers = [loaded["pig_latin"].doc_to_target(doc) for doc in loaded["pig_latin"].eval_docs]
    assert answers == [row["answer"] for row in rows]


def test_text_is_read_in_the_windows_of_the_script(loaded: Any) -> None:
    windows = [doc["text"] for doc in loaded["docstrings"].eval_docs]
    assert "".join(windows) == (FAMILY / "text.txt").read_text("utf-8")
    assert {len(window) for window in windows} == {128}
    assert len(windows) == 220


def test_choices_are_three_plausible_ones_and_one_is_right(loaded: Any) -> None:
    task = loaded["pig_latin_choice"]
    places = set()
    for doc in task.eval_docs:
        choices = task.doc_to_choice(doc)
        assert len(set(choices)) == 3
        place = task.doc_to_target(doc)
        assert choices[place] == doc["answer"]
        places.add(place)
        for choice in choices:
            assert re.fullmatch(r"[a-z]+ay", choice)
            assert abs(len(choice) - len(doc["answer"])) <= 1
    assert places == {0, 1, 2}
