"""Recipes: valid ones, and the errors for invalid ones."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import evaluate, tune
from diffxfer.errors import RecipeError
from diffxfer.recycling.chain_steps import _tune_options
from diffxfer.recycling.recipe import with_defaults
from diffxfer.recycling.recipe_file import read_recipe
from tests.recycling.chains import recipe

if TYPE_CHECKING:
    from diffxfer.recycling.recipe import Recipe

ROWS = {"data": "org/rows", "steps": 3}
COMMAND = "run {model} {output}"


def read(folder: Path, text: str) -> Recipe:
    path = folder / "chain.yaml"
    path.write_text(text)
    return read_recipe(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 700
    assert str(folder / "chain.yaml") in said
    return said


WHOLE = """\
bases: [m1, m2, m3]          # oldest first
finetuned: m1-sft
mode: dir
alpha: [0.8, 1, 1e0]
train:
  data: org/rows
  steps: 20
  learning_rate: 1e-5
  teacher: previous
  distill_weight: 1
eval: {tasks: [gsm8k], include_path: tasks, limit: 200, gen_kwargs: {temperature: 1e-1}}
controls: [base, direct]
keep: models
"""


def test_objectives_and_warm_up_reach_the_training(tmp_path: Path) -> None:
    train = {**ROWS, "objective": "classification", "warmup": 3}
    found = read(tmp_path, json.dumps({"bases": ["m1", "m2"], "train": train})).train
    assert found is not None
    assert (found.objective, found.warmup) == ("classification", 3)
    options = _tune_options(found, distilled=False)
    assert (options["objective"], options["warmup"]) == ("classification", 3)
    assert with_defaults({"train": {"steps": 9}})["train"]["objective"] is None


def test_a_run_from_before_the_warm_up_had_none() -> None:
    assert with_defaults({"train": {"steps": 9}})["train"]["warmup"] == 0
    assert with_defaults({"train": {"steps": 9, "warmup": 3}})["train"]["warmup"] == 3


class TestWhatIsRead:
    def test_every_key_of_a_whole_recipe_is_read(self, tmp_path: Path) -> None:
        found = read(tmp_path, WHOLE)
        assert found.bases == [str(tmp_path / name) for name in ("m1", "m2", "m3")]
        assert found.finetuned == str(tmp_path / "m1-sft")
        assert found.alphas == [0.8, 1.0]
        assert found.train is not None
        assert found.train.data == "org/rows"  # of the Hub
        assert found.train.teacher == "previous"
        # Text in YAML 1.1, which PyYAML reads.
        assert found.train.learning_rate == 1e-5
        assert found.eval is not None
        assert found.eval.include_path == str(tmp_path / "tasks")
        assert found.eval.gen_kwargs == {"temperature": 0.1}
        assert (found.mode, found.keep, found.controls) == ("dir", "models", ["base", "direct"])

    @pytest.mark.parametrize("indent", [None, 2, "\t"])
    def test_json(self, indent: int | str | None, tmp_path: Path) -> None:
        text = json.dumps(recipe(train={**ROWS, "learning_rate": 1e-7}, alpha=2), indent=indent)
        found = read(tmp_path, text)
        assert found.alphas == [2.0]
        assert found.train is not None
        assert found.train.learning_rate == 1e-7

    def test_defaults_are_those_of_the_commands(self, tmp_path: Path) -> None:
        found = read(tmp_path, json.dumps(recipe(train=ROWS, eval={"tasks": ["t"]})))
        assert (found.mode, found.keep, found.controls) == ("iter", "all", ["base"])
        for part, function in ((found.train, tune), (found.eval, evaluate)):
            assert part is not None
            theirs = inspect.signature(function).parameters
            for name in type(part).model_fields.keys() & theirs.keys():
                value = getattr(part, name)
                if name not in ("data", "steps", "tasks") and value is not None:
                    assert value == theirs[name].default, name

    def test_folders_are_relative_to_the_recipe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a b").mkdir()
        (tmp_path / "a b" / "rows.jsonl").write_text("")
        monkeypatch.chdir(tmp_path)
        text = json.dumps(
            {"bases": ["../m1", "/m2"], "train": {"data": "rows.jsonl", "steps": 1, "teacher": "t"}}
        )
        (tmp_path / "a b" / "chain.yaml").write_text(text)
        found = read_recipe(Path("a b/chain.yaml"))
        home = tmp_path / "a b"
        assert found.bases == [str(home / "../m1"), "/m2"]
        assert found.train is not None
        assert found.train.data == str(home / "rows.jsonl")
        assert found.train.teacher == str(home / "t")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bases": None}, "bases: field required"),
    ({"bases": ["m1"]}, "bases: list should have at least 2 items"),
    ({"bases": "m1"}, "bases: input should be a valid list, found 'm1'"),
    ({"bases": ["m1", 2]}, "bases.1: input should be a valid string, found 2"),
    ({"bases": ["m1", ""]}, "bases.1: string should have at least 1 character"),
    ({"bases": ["m1", "m\0"]}, "bases.1: string should match"),
    ({"finetuned": True}, "finetuned: input should be a valid string, found True"),
    ({"mode": "both"}, "mode: input should be 'iter' or 'dir', found 'both'"),
    (
        {"alpha": "big"},
        "alpha: input should be a valid number or input should be a valid list, found 'big'",
    ),
    (
        {"alpha": True},
        "alpha: input should be a valid number or input should be a valid list, found True",
    ),
    ({"alpha": [1.0, "x"]}, "alpha.1: input should be a valid number, found 'x'"),
    ({"alpha": []}, "alpha is empty"),
    ({"alpha": [1, 2]}, "choosing among several alphas requires eval"),
    ({"keep": "some"}, "keep: input should be 'all', 'models' or 'last', found 'some'"),
    (
        {"controls": ["bsae"]},
        "controls.0: input should be 'base', 'direct', 'initialised' or 'distilled', found",
    ),
    (
        {"controls": ["direct"]},
        "the control direct fine-tunes each base directly, which requires train",
    ),
    ({"mode": "dir"}, "mode dir fine-tunes each base directly, which requires train"),
    ({"finetuned": None}, "needs finetuned, or train to make it from the first base"),
    ({"basis": 1}, "basis: is not a recipe key; did you mean bases?"),
    ({"zzz": 1}, "zzz: is not a recipe key; the keys are added, alpha, bases, controls"),
    ({"train": {}}, "train: needs data and steps, or a command"),
    ({"train": {"data": "a/b"}}, "train: needs data and steps, or a command"),
    ({"train": {**ROWS, "steps": 0}}, "train.steps: input should be greater than or equal to 1"),
    ({"train": {**ROWS, "steps": True}}, "train.steps: input should be a valid integer, found Tr"),
    ({"train": {**ROWS, "steps": "9"}}, "train.steps: input should be a valid integer, found '9'"),
    ({"train": {**ROWS, "seed": -1}}, "train.seed: input should be greater than or equal to 0"),
    ({"train": {**ROWS, "learning_rat": 1}}, "train.learning_rat: is not a recipe key; did you"),
    ({"train": {**ROWS, "objective": "clm"}}, "train.objective: input should be 'causal', 'clas"),
    ({"train": {**ROWS, "warmup": -1}}, "train.warmup: input should be greater than or equal"),
    ({"train": {**ROWS, "learning_rate": 0}}, "train.learning_rate: input should be greater tha"),
    ({"train": {**ROWS, "device": "tpu"}}, "train.device: input should be 'cpu' or 'cuda'"),
    ({"train": {**ROWS, "temperature": 2.0}}, "distillation needs a teacher, such as previous"),
    ({"train": {"command": COMMAND, "steps": 3}}, "train: steps has no effect with a command"),
    ({"train": {"command": "run {model}"}}, "train: command lacks {output}"),
    ({"train": {"command": "run {output}"}}, "train: command lacks {model}"),
    ({"train": {"command": COMMAND + " '"}}, "command cannot be split into words (No closing"),
    ({"train": {"command": COMMAND + " {teacher}"}}, "command has {teacher}, but no teacher is"),
    (
        {
            "train": {"command": COMMAND + " {teacher}", "teacher": "previous"},
            "controls": ["direct"],
        },
        "command has {teacher}, but a base that is fine-tuned directly has none",
    ),
    ({"eval": {}}, "eval.tasks: field required"),
    ({"eval": {"tasks": []}}, "eval.tasks: list should have at least 1 item"),
    ({"eval": {"tasks": "gsm8k"}}, "eval.tasks: input should be a valid list, found 'gsm8k'"),
    ({"eval": {"tasks": ["t"], "bathc_size": 1}}, "eval.bathc_size: is not a recipe key; did y"),
    (
        {"eval": {"tasks": ["t"], "batch_size": [1]}},
        "eval.batch_size: input should be a valid integer or input should be a valid string, fo",
    ),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_key_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, json.dumps(recipe(**changes)))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

BROKEN = {
    "empty": ("", "is not a mapping"),
    "a list": ("- bases\n", "is not a mapping"),
    "a word": ("bases", "is not a mapping"),
    "two documents": ("bases: [a, b]\n---\nbases: [c, d]\n", "expected a single document"),
    "not closed": ("bases: [a, b", "is not valid YAML"),
    "a key twice": ("bases: [a, b]\nbases: [c, d]\n", "bases appears twice"),
    "an inner key twice": ("bases: [a, b]\ntrain: {steps: 1, steps: 2}\n", "steps appears twice"),
    "a key that is no word": ("? [a, b]\n: c\n", "is not valid YAML"),
    "a number for a key": ("1: 2\nbases: [a, b]\nfinetuned: c\n", "1: "),
    "Python": ("bases: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
    "an alias": ("bases: &b [a, b]\nfinetuned: *b\n", "aliases such as *name are not supported"),
    "laughs": (BOMB + "bases: *i\n", "aliases such as *name are not supported"),
    "deep": ("[" * 5000, "is not valid YAML"),
    "a long number": (f"bases: {'9' * 5000}\n", "is not valid YAML"),
    "no such day": ("bases: 2024-13-45\n", "is not valid YAML"),
    "a letter that nobody prints": ("bases: [a\x07, b]\n", "special characters are not allowed"),
    "much": ("#" * 1_000_001, "is too large for a recipe"),
    "nothing in it": ("bases:\ntrain:\n", "bases: input should be a valid list, found None"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name: str, tmp_path: Path) -> None:
    text, said = BROKEN[name]
    assert said in refusal(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_bytes(b"bases: [\xff\xfe]")
    with pytest.raises(RecipeError, match="can't decode"):
        read_recipe(tmp_path / "chain.yaml")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file; give the recipe"):
        read_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="is not a file; give the recipe"):
        read_recipe(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would block for ever
    with pytest.raises(RecipeError, match="is not a file"):
        read_recipe(tmp_path / "pipe")


def test_rows_that_are_not_there_are_missed_at_once(tmp_path: Path) -> None:
    text = json.dumps(recipe(train={"data": "rows.jsonl", "steps": 1}))
    (tmp_path / "chain.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match=r"rows\.jsonl: is named by train\.data, but is not a file"
    ):
        read_recipe(tmp_path / "chain.yaml")
