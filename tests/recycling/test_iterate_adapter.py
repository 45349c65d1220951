"""Chains whose fine-tuned model is a LoRA adapter."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import iterate, transfer
from diffxfer.errors import CheckpointError, RecipeError
from diffxfer.recycling import chain_steps
from diffxfer.recycling.chain_plan import StepKind, plan_chain
from tests.diffs.adapters.variants import merged
from tests.recycling.chains import EVAL, TRAIN, follow, left, make_home, models
from tests.recycling.test_chain_plan import ROWS, RUN, made, told
from tests.recycling.training import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("trl")

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TWO: dict[str, Any] = {"bases": ["base", "target"], "finetuned": "adapter"}
TAUGHT = {**TRAIN, "teacher": "previous"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = make_home(tmp_path / "home")
    shutil.copytree(FAMILY / "adapter", folder / "adapter")
    return folder


class TestPlans:
    def test_delta_alone_needs_no_model(self) -> None:
        assert told(plan_chain(made(), RUN, is_adapter=True)) == [
            "2 graft = graft(/sft, /m2, /m1)",
            "2 diff = extract(2/graft, /m2)",
            "3 graft = graft(2/diff, /m3)",
        ]

    @pytest.mark.parametrize("mode", ["iter", "dir"])
    def test_scores_need_the_model(self, mode: str) -> None:
        plan = plan_chain(
            made(bases=["/m1", "/m2"], mode=mode, eval={"tasks": ["t"]}), RUN, is_adapter=True
        )
        assert told(plan)[:3] == [
            "1 model = merge(/sft, /m1)",
            "1 scores = score(/m1, 1/model)",
            "2 graft = graft(/sft, /m2, /m1)",
        ]

    def test_the_choice_of_alpha_needs_a_diff_vector(self) -> None:
        recipe = made(bases=["/m1", "/m2"], alpha=[0.5, 1], eval={"tasks": ["t"]})
        assert told(plan_chain(recipe, RUN, is_adapter=True))[2:5] == [
            "1 diff = extract(/sft, /m1)",
            "2 alpha = choose(1/diff, /m2)",
            "2 graft = graft(/sft, /m2, /m1)",
        ]

    @pytest.mark.parametrize("teacher", ["previous", "/sft"])
    def test_a_teacher_is_the_model(self, teacher: str) -> None:
        recipe = made(bases=["/m1", "/m2"], train={**ROWS, "teacher": teacher})
        assert told(plan_chain(recipe, RUN, is_adapter=True)) == [
            "1 model = merge(/sft, /m1)",
            "2 graft = graft(/sft, /m2, /m1)",
            "2 model = tune(2/graft, 1/model)",
        ]

    def test_another_teacher_needs_no_model(self) -> None:
        recipe = made(bases=["/m1", "/m2"], train={**ROWS, "teacher": "/t"})
        plan = plan_chain(recipe, RUN, is_adapter=True)
        assert StepKind.MERGE not in {step.kind for step in plan}


class TestRuns:
    def test_the_same_as_by_hand(self, home: Path, tmp_path: Path) -> None:
        report = follow(home, tmp_path / "run", **TWO)
        assert not report.warnings
        transfer(home / "adapter", home / "base", home / "target", tmp_path / "graft")
        expected = (tmp_path / "graft" / "model.safetensors").read_bytes()
        assert models(tmp_path / "run") == {"round-02/graft": expected}

    def test_the_teacher_is_what_peft_merges(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        report = follow(home, run, train=TAUGHT, **TWO)
        assert not report.warnings
        assert set(report.rounds[0].losses) == set()
        assert set(report.rounds[1].losses) == {"model"}
        found = load_file(run / "round-01" / "model" / "model.safetensors")
        expected = merged(home)
        for name, tensor in found.items():
            # One rounding: a sum that is nearly between two values may go either way.
            exact = expected[name]
            ulp = torch.finfo(tensor.dtype).eps * exact.abs()
            assert ((tensor.double() - exact).abs() <= 0.5001 * ulp + 1e-30).all(), name
        assert (run / "round-01" / "model" / "diffxfer.json").is_file()
        assert (run / "round-01" / "model" / "tokenizer.json").is_file()

    def test_scored_as_the_tuned_model(self, home: Path, tmp_path: Path) -> None:
        report = follow(home, tmp_path / "run", eval=EVAL, keep="last", **TWO)
        stages = [(row["round"], row["stage"]) for row in report.rows()]
        assert stages == [(1, "base"), (1, "tuned"), (2, "base"), (2, "graft")]
        values = [row["value"] for row in report.rows()]
        assert values[0] == values[2] == 0
        assert values[1] > 0.9, "the adapter knows its task on its base"
        assert left(tmp_path / "run") == {"round-02/graft"}


class TestResume:
    def test_after_a_failure(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        with monkeypatch.context() as patched:
            patched.setattr(chain_steps, "_graft", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                follow(home, run, train=TAUGHT, **TWO)
        assert left(run) == {"round-01/model"}
        model = run / "round-01" / "model" / "model.safetensors"
        before = model.stat().st_mtime_ns
        follow(home, run, train=TAUGHT, **TWO)
        assert model.stat().st_mtime_ns == before, "the model was not made again"
        assert follow(home, run, train=TAUGHT, **TWO).steps_done == 0

    def test_a_missing_model_is_made_again_for_a_step_that_reads_it(
        self, home: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        follow(home, run, train=TAUGHT, **TWO)
        model = run / "round-01" / "model"
        before = (model / "model.safetensors").read_bytes()
        shutil.rmtree(model)
        assert follow(home, run, train=TAUGHT, **TWO).steps_done == 0
        iterate(home / "chain.yaml", run, from_round=2)
        assert (model / "model.safetensors").read_bytes() == before

    def _change_factors(self, home: Path) -> None:
        tensors = load_file(home / "adapter" / FILE)
        save_file(
            {name: tensor + 0.01 for name, tensor in tensors.items()}, home / "adapter" / FILE
        )

    def _change_alpha(self, home: Path) -> None:
        path = home / "adapter" / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 17}))

    @pytest.mark.parametrize("change", [_change_factors, _change_alpha])
    def test_a_changed_adapter_is_refused(
        self, change: Callable[..., None], home: Path, tmp_path: Path
    ) -> None:
        follow(home, tmp_path / "run", **TWO)
        change(self, home)
        with pytest.raises(RecipeError, match="adapter: changed since this run began; restore"):
            follow(home, tmp_path / "run", **TWO)

    def test_the_same_files_with_new_dates(self, home: Path, tmp_path: Path) -> None:
        follow(home, tmp_path / "run", **TWO)
        for name in (FILE, CONFIG):
            (home / "adapter" / name).touch()
        assert follow(home, tmp_path / "run", **TWO).steps_done == 0


class TestRefusals:
    def test_an_adapter_of_another_model(self, home: Path, tmp_path: Path) -> None:
        path = home / "adapter" / FILE
        tensors = load_file(path)
        save_file({name.replace("q_proj", "w_proj"): t for name, t in tensors.items()}, path)
        with pytest.raises(CheckpointError, match="and base has no such tensor; give the base of"):
            follow(home, tmp_path / "run", **TWO)
        assert not (tmp_path / "run").exists()

    def test_an_adapter_as_a_base(self, home: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="adapter"):
            follow(home, tmp_path / "run", bases=["base", "adapter"], finetuned="finetuned")
