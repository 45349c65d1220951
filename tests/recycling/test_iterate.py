"""Chains on a family of three bases: what they write, keep, resume and refuse."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import apply_diff, extract_diff, iterate, transfer, tune
from diffxfer.checkpoints.filesystem import lock_folder
from diffxfer.errors import (
    DiskSpaceError,
    EvaluationError,
    MatchError,
    OptionError,
    OutputError,
    OutputExistsError,
    RecipeError,
)
from diffxfer.recycling.input_fingerprints import file_fingerprints
from diffxfer.recycling.recipe_file import read_recipe
from tests import oracle, tiny
from tests.checkpoints.test_writer import mounted
from tests.recycling.chains import (
    EVAL,
    TRAIN,
    follow,
    left,
    make_home,
    models,
    weights,
    write_recipe,
)
from tests.recycling.training import FAMILY

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("chain") / "a home")


@pytest.fixture
def home(shared_home: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(shared_home, tmp_path / "home")


def trained(home: Path, model: Path, out: Path, **options: Any) -> Path:
    known = {name: value for name, value in TRAIN.items() if name != "data"} | options
    tune(model, home / "train.jsonl", out, **known)
    return out


class TestByHand:
    """A chain writes the same models as the single commands."""

    @pytest.mark.parametrize("mode", ["iter", "dir"])
    def test_both_modes(self, mode: str, home: Path, tmp_path: Path) -> None:
        run, hand = tmp_path / "run", tmp_path / "by hand"
        follow(home, run, mode=mode, alpha=0.9, train=TRAIN)
        hand.mkdir()
        extract_diff(home / "finetuned", home / "base", hand / "diff-1", pack=True)
        apply_diff(hand / "diff-1", home / "target", hand / "graft-2", alpha=0.9)
        model = trained(home, hand / "graft-2", hand / "model-2")
        source = model if mode == "iter" else trained(home, home / "target", hand / "direct-2")
        extract_diff(source, home / "target", hand / "diff-2", pack=True)
        apply_diff(hand / "diff-2", home / "newest", hand / "graft-3", alpha=0.9)
        trained(home, hand / "graft-3", hand / "model-3")
        by_hand = {path.name: weights(path) for path in hand.iterdir()}
        by_chain = {
            f"{name.split('/')[1]}-{int(name.split('/')[0][-2:])}": content
            for name, content in models(run).items()
        }
        assert by_chain == by_hand
        assert left(run) == {f"round-{name[-2:].replace('-', '0')}/{name[:-2]}" for name in by_hand}

    @pytest.mark.parametrize("alpha", [1.0, 0.7])
    def test_every_graft_is_the_exact_sum(self, alpha: float, home: Path, tmp_path: Path) -> None:
        """target + (finetuned − base)·alpha in float64, cast once: no Δ is rounded in between."""
        run = tmp_path / "run"
        follow(home, run, alpha=alpha)
        chain = [home / "base", home / "target", home / "newest"]
        tuned = [home / "finetuned", run / "round-02" / "graft"]
        rounded = 0
        for number, base in enumerate(chain[1:], 2):
            files = (tuned[number - 2], chain[number - 2], base, run / f"round-0{number}" / "graft")
            f, b, t, graft = (load_file(folder / "model.safetensors") for folder in files)
            assert graft.keys() == t.keys()
            for name, tensor in t.items():
                delta = f[name].double() - b[name].double()
                expected = (tensor.double() + delta * alpha).to(tensor.dtype)
                assert oracle.same(graft[name], expected), (number, name)
                nearly = tensor.double() + delta.to(tensor.dtype).double() * alpha
                rounded += not oracle.same(nearly.to(tensor.dtype), expected)
        assert rounded, "a rounded Δ gives another graft"

    def test_a_teacher_from_the_round_before(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        taught = {**TRAIN, "teacher": "previous", "distill_weight": 0.5, "temperature": 2.0}
        follow(home, run, bases=["base", "target"], train=taught)
        model = trained(
            *(home, run / "round-02" / "graft", tmp_path / "model"),
            teacher=home / "finetuned",
            distill_weight=0.5,
            temperature=2.0,
        )
        assert weights(model) == weights(run / "round-02" / "model")

    def test_without_finetuned_and_with_direct(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        report = follow(
            *(home, run),
            bases=["base", "target"],
            finetuned=None,
            train=TRAIN,
            controls=["direct"],
        )
        for number, base in ((1, "base"), (2, "target")):
            made = trained(home, home / base, tmp_path / base)
            name = "model" if number == 1 else "direct"
            assert weights(made) == weights(run / f"round-0{number}" / name)
        assert not report.measures
        assert report.rounds[0].losses.keys() == {"model"}
        assert [entry["step"] for entry in report.rounds[1].losses["direct"]] == [1, 2]


@pytest.fixture(scope="module")
def scored(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("scored") / "run"
    report = follow(
        *(shared_home, run),
        bases=["base", "target"],
        train=TRAIN,
        controls=["base", "direct"],
        alpha=[0.1, 1.2],
        eval=EVAL,
    )
    assert report.steps_done == 7
    return run


class TestScores:
    def test_every_column_of_every_round(self, scored: Path, shared_home: Path) -> None:
        outcome = tiny.run("iterate", shared_home / "chain.yaml", "-o", scored, "--json")
        assert (outcome.status, outcome.err) == (0, "")
        found = json.loads(outcome.out)
        assert found["steps_done"] == 0
        first, second = found["rounds"]
        assert first["scores"].keys() == {"base", "tuned"}
        assert second["scores"].keys() == {"base", "graft", "tuned", "direct"}
        assert (first["alpha"], second["alpha"]) == (None, 1.2)
        assert second["scores"]["graft"][0]["value"] > second["scores"]["base"][0]["value"] == 0.0
        assert second["scores"]["graft"][0]["baseline"] == "base"
        assert second["scores"]["graft"][0]["n"] == EVAL["limit"]
        assert found["measures"] == [["pig_latin", "exact_match", "none"]]
        assert [(row["round"], row["stage"], row["alpha"]) for row in found["rows"]] == [
            *((1, "base", None), (1, "tuned", None)),
            *((2, "base", None), (2, "graft", 1.2), (2, "tuned", 1.2), (2, "direct", None)),
        ]
        graft = second["scores"]["graft"][0]
        assert found["rows"][3] == {
            "round": 2,
            "base": "target",
            "stage": "graft",
            "alpha": 1.2,
            **{key: graft[key] for key in ("task", "metric", "filter", "value", "stderr", "n")},
        }

    def test_the_graft_has_the_alpha_that_scored_best(
        self, scored: Path, shared_home: Path, tmp_path: Path
    ) -> None:
        apply_diff(scored / "round-01/diff", shared_home / "target", tmp_path / "graft", alpha=1.2)
        assert weights(tmp_path / "graft") == weights(scored / "round-02/graft")
        done = json.loads((scored / "state.json").read_text())["done"]["round-02/alpha"]
        assert done["alpha"] == 1.2
        assert done["values"]["1.2"] > done["values"]["0.1"]

    def test_the_table(self, scored: Path, shared_home: Path) -> None:
        outcome = tiny.run("iterate", shared_home / "chain.yaml", "-o", scored)
        title, heading, first, second = outcome.out.splitlines()
        assert title.strip() == "pig_latin, exact_match"
        columns = ["base", "graft", "tuned", "direct"]
        assert heading.split() == ["round", "base", "model", "alpha", *columns]
        assert first.split()[:3] == ["1", "base", "0.0000"]
        assert second.split()[:4] == ["2", "target", "1.2", "0.0000"]
        assert outcome.err.splitlines() == [
            "all rounds were already done",
            f"the full report is in {scored / 'report.html'}",
        ]


def test_the_stages_are_told_of_in_order(home: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    opened: list[Path] = []
    recipe = write_recipe(home, bases=["base", "target"])
    iterate(recipe, tmp_path / "run", stage=stages.append, opened=opened.append)
    assert stages == ["round 1/2, subtracting", "round 2/2, grafting"]
    assert opened == [tmp_path / "run"]


class TestAgain:
    def test_does_nothing(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        assert follow(home, run).steps_done == 4
        before = tiny.tree(run)
        said: list[str] = []
        report = iterate(home / "chain.yaml", run, progress=said.append)
        assert (report.steps_done, said) == (0, [])
        assert tiny.tree(run) == before

    def test_by_other_dates_and_another_way_to_the_same_folder(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        follow(home, run)
        (home / "base" / "model.safetensors").touch()
        monkeypatch.chdir(home)
        assert iterate("chain.yaml", "../run").steps_done == 0

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"alpha": 0.5}, "the recipe changed: alpha was 1.0 and is 0.5"),
            ({"keep": "last"}, 'the recipe changed: keep was "all" and is "last"'),
            ({"train": TRAIN}, "the recipe changed: train"),
            ({"bases": ["base", "newest", "target"]}, r"bases\.1 was .*target. and is .*newest."),
            ({"bases": ["base", "target", "newest", "target"]}, r"bases\.3 was absent and is"),
            ({"bases": ["base", "target"]}, r"bases\.2 was .*newest. and is absent"),
        ],
        ids=str,
    )
    def test_a_changed_recipe_is_refused(
        self, changes: dict[str, Any], said: str, home: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        follow(home, run)
        before = tiny.tree(run)
        with pytest.raises(RecipeError, match=said) as caught:
            follow(home, run, **changes)
        assert "--from-round" in str(caught.value)
        assert tiny.tree(run) == before

    def test_a_changed_input_is_refused(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        follow(home, run)
        # Shapes and names are the same; only the values differ.
        shutil.copy(home / "target/model.safetensors", home / "newest/model.safetensors")
        with pytest.raises(RecipeError, match=r"newest: changed since .* give --from-round 3"):
            iterate(home / "chain.yaml", run)
        assert iterate(home / "chain.yaml", run, from_round=3).steps_done == 1
        tiny.edit_json(home / "base/config.json", lambda config: config.update(bos_token_id=0))
        for chosen in (None, 2):
            with pytest.raises(RecipeError, match=r"base: changed since .* give --from-round 1"):
                iterate(home / "chain.yaml", run, from_round=chosen)
        shutil.rmtree(home / "base")
        with pytest.raises(Exception, match="base"):
            iterate(home / "chain.yaml", run)

    def test_changed_rows_are_refused(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        follow(home, run, bases=["base", "target"], train=TRAIN)
        rows = (home / "train.jsonl").read_text().splitlines(keepends=True)
        (home / "train.jsonl").write_text("".join(rows[1:]))
        with pytest.raises(RecipeError, match=r"train\.jsonl: changed since this run began"):
            iterate(home / "chain.yaml", run)
        assert iterate(home / "chain.yaml", run, from_round=2).steps_done == 2

    def test_a_changed_script_is_refused(self, home: Path, tmp_path: Path) -> None:
        run, script = tmp_path / "run", home / "trainer.py"
        script.write_text("import shutil, sys; shutil.copytree(*sys.argv[1:3])")
        words = [sys.executable, "trainer.py", "{model}", "{output}", "a" * 300]
        follow(home, run, bases=["base", "target"], train={"command": shlex.join(words)})
        script.write_text(f"{script.read_text()}\n")
        with pytest.raises(RecipeError, match="changed since this run began") as caught:
            iterate(home / "chain.yaml", run)
        assert caught.value.where == str(script)
        assert "give --from-round to repeat rounds" in str(caught.value)
        assert iterate(home / "chain.yaml", run, from_round=2).steps_done == 2

    def test_changed_tasks_are_seen(self, home: Path) -> None:
        shutil.copytree(FAMILY / "tasks", home / "tasks")
        path = write_recipe(home, eval=EVAL | {"include_path": "tasks"})

        def seen() -> dict[str, str]:
            return file_fingerprints(read_recipe(path), home, home / "tasks" / "run")

        before = seen()
        assert before.keys() == {str(home / "tasks")}
        (home / "tasks" / "notes.txt").write_text("no task")
        (home / "tasks" / "run").mkdir()
        (home / "tasks" / "run" / "remote.py").write_text("came with a model")
        assert seen() == before
        for name in ("pig_latin.yaml", "family_data.py"):
            with (home / "tasks" / name).open("a") as file:
                file.write("# changed\n")
            assert seen() != before
            before = seen()

    def test_a_run_from_before_a_key_was_known_goes_on(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        program = "import shutil, sys; shutil.copytree(*sys.argv[1:])"
        command = shlex.join([sys.executable, "-c", program, "{model}", "{output}"])
        changes = {"bases": ["base", "target"], "train": {"command": command}}
        follow(home, run, **changes)

        def forget(state: dict[str, Any]) -> None:
            del state["recipe"]["keep"], state["recipe"]["train"]["save_every"]

        tiny.edit_json(run / "state.json", forget)
        assert iterate(home / "chain.yaml", run).steps_done == 0
        with pytest.raises(RecipeError, match='keep was "all" and is "last"'):
            follow(home, run, keep="last", **changes)

    def test_a_run_with_a_rounded_diff_vector_goes_on(self, home: Path, tmp_path: Path) -> None:
        """An older version stored it plainly; the rounds that follow are exact."""
        run, told = tmp_path / "run", list[str]()
        follow(home, run, bases=["base", "target"])
        shutil.rmtree(run / "round-01" / "diff")
        extract_diff(home / "finetuned", home / "base", run / "round-01" / "diff")

        def forget(state: dict[str, Any]) -> None:
            del state["done"]["round-01/diff"]["exact"], state["done"]["round-02/graft"]

        tiny.edit_json(run / "state.json", forget)
        assert iterate(home / "chain.yaml", run, progress=told.append).steps_done == 1
        assert [line for line in told if "rounded" in line] == [
            "round-01/diff is rounded: an older version made it; --from-round 1 makes an exact one"
        ]
        apply_diff(run / "round-01" / "diff", home / "target", tmp_path / "graft")
        assert weights(run / "round-02" / "graft") == weights(tmp_path / "graft")
        assert iterate(home / "chain.yaml", run, from_round=1).steps_done == 2
        transfer(home / "finetuned", home / "base", home / "target", tmp_path / "direct")
        assert weights(run / "round-02" / "graft") == weights(tmp_path / "direct")


class TestFromRound:
    def test_another_alpha_from_there_on(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        follow(home, run)
        before = models(run)
        write_recipe(home, alpha=0.5)
        assert iterate(home / "chain.yaml", run, from_round=3).steps_done == 1
        changed = {name for name, content in models(run).items() if before[name] != content}
        assert changed == {"round-03/graft"}
        assert iterate(home / "chain.yaml", run).steps_done == 0
        fresh = tmp_path / "fresh"
        follow(home, fresh, alpha=0.5)
        iterate(home / "chain.yaml", run, from_round=1)
        assert models(run) == models(fresh)

    def test_a_new_base_goes_on_the_end(self, home: Path, tmp_path: Path) -> None:
        run, whole = tmp_path / "run", tmp_path / "whole"
        follow(home, run, bases=["base", "target"], keep="last")
        write_recipe(home, keep="last")
        report = iterate(home / "chain.yaml", run, from_round=3)
        assert report.steps_done == 2  # the difference of round 2, and the graft
        follow(home, whole, keep="last")
        assert models(run) == models(whole)

    def test_what_shaped_an_earlier_round_may_not_change(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        follow(home, run)
        before = tiny.tree(run)
        for changes, least in (
            ({"bases": ["base", "newest", "target"]}, 2),
            ({"finetuned": "target"}, 1),
            ({"mode": "dir", "train": TRAIN}, 2),
        ):
            write_recipe(home, **changes)
            with pytest.raises(RecipeError, match=f"--from-round {least} to"):
                iterate(home / "chain.yaml", run, from_round=3)
        assert tiny.tree(run) == before

    @pytest.mark.parametrize("keep", [pytest.param("models", marks=pytest.mark.slow), "last"])
    def test_folders_that_are_gone_are_made_again(
        self, keep: str, home: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        follow(home, run, keep=keep, train=TRAIN)
        before = models(run)
        report = iterate(home / "chain.yaml", run, from_round=3)
        # Extracting again needs the model of round 2, which needs its graft, and so on.
        assert report.steps_done == (3 if keep == "models" else 6)
        assert models(run) == before
        assert left(run) == {"round-02/model", "round-03/model"} - (
            {"round-02/model"} if keep == "last" else set()
        )

    def test_not_by_two_recipes(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        follow(home, run, keep="last")
        write_recipe(home, keep="last", alpha=0.5)
        with pytest.raises(
            OptionError, match=r"round 3 needs round-01/diff, which is missing.* give 1"
        ):
            iterate(home / "chain.yaml", run, from_round=3)

    @pytest.mark.parametrize("number", [0, 4])
    def test_no_such_round(self, number: int, home: Path, tmp_path: Path) -> None:
        with pytest.raises(
            OptionError, match=rf"{number} is not a round of this recipe; give 1 to 3"
        ):
            iterate(write_recipe(home), tmp_path / "run", from_round=number)
        assert not (tmp_path / "run").exists()

    def test_what_a_kill_left_of_another_recipe_is_gone(self, home: Path, tmp_path: Path) -> None:
        class StopError(Exception):
            pass

        def stop(done: int, *_: object) -> None:
            if done == 2:
                raise StopError

        run = tmp_path / "run"
        write_recipe(home, bases=["base", "target"], train={**TRAIN, "save_every": 1})
        with pytest.raises(StopError):
            iterate(home / "chain.yaml", run, training=stop)
        assert "round-02/.model.tuning" in left(run)
        write_recipe(home, bases=["base", "target"], train={**TRAIN, "steps": 1})
        assert iterate(home / "chain.yaml", run, from_round=2).steps_done == 2
        assert left(run) == {"round-01/diff", "round-02/graft", "round-02/model"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        pytest.param(
            "all",
            {
                *("round-01/diff", "round-02/graft", "round-02/model", "round-02/direct"),
                *("round-02/diff", "round-03/graft", "round-03/model", "round-03/direct"),
            },
            marks=pytest.mark.slow,
        ),
        ("models", {f"round-0{n}/{name}" for n in (2, 3) for name in ("model", "direct")}),
        ("last", {"round-03/model"}),
    ],
)
def test_what_stays(keep: str, kept: set[str], home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = {**TRAIN, "steps": 1}
    follow(home, run, keep=keep, train=small, controls=["direct"])
    assert left(run) == kept
    assert {path.name for path in run.iterdir()} == {
        *("round-01", "round-02", "round-03", "state.json", "report.html")
    }


class TestRefusals:
    def test_a_task_without_data_before_anything_is_done(self, home: Path, tmp_path: Path) -> None:
        (home / "tasks").mkdir()
        (home / "tasks" / "own.yaml").write_text(
            "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n"
            "test_split: test\ndoc_to_text: x\ndoc_to_target: x\n"
        )
        scoring = EVAL | {"tasks": ["own"], "include_path": "tasks"}
        with pytest.raises(EvaluationError, match="its data cannot be loaded"):
            follow(home, tmp_path / "run", eval=scoring)
        assert left(tmp_path / "run") == set()

    def test_a_folder_of_somebody_else(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        (run / "diary").write_text("dear")
        with pytest.raises(OutputExistsError, match=r"is not empty, and has no state\.json"):
            follow(home, run)
        assert [path.name for path in run.iterdir()] == ["diary"]

    def test_a_file(self, home: Path, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(OutputError, match="is not a folder"):
            follow(home, tmp_path / "run")

    def test_inside_an_input(self, home: Path) -> None:
        with pytest.raises(OutputExistsError, match="is inside the input"):
            follow(home, home / "base" / "run")

    def test_another_run(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        held = lock_folder(run)
        try:
            with pytest.raises(OutputError, match="is in use by another run"):
                follow(home, run)
        finally:
            os.close(held)
        assert follow(home, run).steps_done == 4

    def test_a_small_disk(self, home: Path, tmp_path: Path) -> None:
        size = (home / "base" / "model.safetensors").stat().st_size
        with mounted(tmp_path / "disk", f"{2 * size // 1024}k") as disk:
            with pytest.raises(DiskSpaceError, match=r"needs 6\.\d\d MB, but only 3\.\d\d MB are"):
                follow(home, disk / "run")
            assert not models(disk / "run")

    def test_a_model_that_is_not_there(self, home: Path, tmp_path: Path) -> None:
        for changes in (
            {"bases": ["base", "nothing"]},
            {"finetuned": "nothing"},
            {"train": {**TRAIN, "teacher": "nothing"}},
        ):
            outcome = tiny.run("iterate", write_recipe(home, **changes), "-o", tmp_path / "run")
            assert outcome.status == 1
            assert "nothing: no such folder" in outcome.err
            assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("place", ["finetuned", "newest"])
    def test_an_unrelated_model_before_anything_is_done(
        self, place: str, home: Path, tmp_path: Path
    ) -> None:
        """A random model with the shapes of the family is refused before any training."""
        path = home / place / "model.safetensors"
        drawn = torch.Generator().manual_seed(1)
        weights = {
            name: torch.randn(tensor.shape, generator=drawn).to(tensor.dtype)
            for name, tensor in load_file(path).items()
        }
        save_file(weights, path, {"format": "pt"})
        outcome = tiny.run("iterate", write_recipe(home, train=TRAIN), "-o", tmp_path / "run")
        assert outcome.status == 1
        roles = "finetuned and base" if place == "finetuned" else "base and target"
        assert f"error: {home / place}: {roles} are unrelated: the cosine of" in outcome.err
        assert outcome.err.endswith("; check the bases and finetuned of the recipe\n")
        assert left(tmp_path / "run") == set()

    def test_bases_of_other_shapes_before_anything_is_done(
        self, home: Path, tmp_path: Path
    ) -> None:
        path = home / "newest" / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 4).bfloat16()
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(MatchError, match=r"newest: 1 tensor does not fit: .*\.up_proj\.weight"):
            follow(home, tmp_path / "run")
        assert left(tmp_path / "run") == set()

    def test_a_diff_vector_for_a_base(self, home: Path, tmp_path: Path) -> None:
        extract_diff(home / "finetuned", home / "base", home / "diff")
        with pytest.raises(Exception, match="diff vector"):
            follow(home, tmp_path / "run", bases=["base", "diff"])

    @pytest.mark.parametrize(
        ("text", "said"),
        [("{", "JSON"), ("[]", "state.json"), ('{"format": 9}', "has format 9, but this version")],
    )
    def test_a_state_that_is_broken(self, text: str, said: str, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        (run / "state.json").write_text(text)
        outcome = tiny.run("iterate", write_recipe(home), "-o", run)
        assert outcome.status == 1
        assert said in outcome.err
        assert (run / "state.json").read_text() == text


def test_the_first_state_half_written_is_no_obstacle(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.partial").write_text('{"forma')
    assert follow(home, run).steps_done == 4
    assert not (run / "state.partial").exists()


def test_one_folder_for_two_roles(home: Path, tmp_path: Path) -> None:
    report = follow(home, tmp_path / "run", bases=["base", "base"], finetuned="base", eval=EVAL)
    first, second = report.rounds
    assert first.scores.keys() == {"base", "tuned"}
    assert second.scores.keys() == {"base", "graft"}
    assert all(math.isfinite(row["value"]) for rows in first.scores.values() for row in rows)


def test_a_json_file_is_json(scored: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((scored / "state.json").read_text(), parse_constant=refuse)


def test_an_input_that_the_run_makes_itself_is_refused(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    follow(home, run, finetuned=str(home / "finetuned"), keep="all")
    before = models(run)
    made = str(run / "round-02" / "graft")
    for changes in ({"finetuned": made}, {"bases": [made, str(home / "target")]}):
        with pytest.raises(
            OptionError, match="is an input, and also a folder that this run writes"
        ):
            iterate(write_recipe(home, **changes), run, from_round=1)
    assert models(run) == before


def test_a_report_that_was_not_written_again_is_not_left_as_it_was(
    home: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    follow(home, run)
    (run / "report.html").write_text("old")
    state = json.loads((run / "state.json").read_text())
    last = list(state["done"])[-1]
    del state["done"][last]
    (run / "state.json").write_text(json.dumps(state))
    follow(home, run)
    assert (run / "report.html").read_text() != "old"
