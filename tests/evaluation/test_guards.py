"""Unusual inputs: odd names, changed code, corrupt files, full disks, scores that are NaN."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401 its own backends come first, or it takes ours for all there are
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from safetensors.torch import load_file, save_file

from diffxfer import Evaluation, Row, apply_diff, evaluate, extract_diff
from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.diffs.inspection.describe import norms_by_kind
from diffxfer.errors import (
    DiffxferError,
    MatchError,
    OptionError,
    OutputError,
    RelatednessError,
    VocabularyError,
)
from diffxfer.evaluation.score_rows import best_alpha
from tests.evaluation.conftest import FAMILY

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET, DIRECT = FAMILY / "target", FAMILY / "direct"
ASKED: list[dict[str, Any]] = []


@register_model("notes")
class Notes(LM):
    """A backend that records its options and its requests."""

    def __init__(self, **made: Any) -> None:
        super().__init__()
        self.made = made

    @property
    def tokenizer_name(self) -> str:
        return "notes"

    def chat_template(self, *_: Any, **__: Any) -> str:
        return "as JSON"

    def apply_chat_template(self, chat_history: list[dict[str, str]], **_: Any) -> str:
        return json.dumps(chat_history)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        ASKED.append({**self.made, "requests": [request.args for request in requests]})
        return [(-1.0 if os.environ.get("ODD") is None else math.nan, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return [0.0 for _ in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        ASKED.append({**self.made, "requests": [request.args for request in requests]})
        return ["" for _ in requests]


def ask(folder: Path, *models: Path, **more: Any) -> Evaluation:
    ASKED.clear()
    settings = {"tasks": "written", "include_path": folder, "backend": "notes", **more}
    return evaluate(list(models) or TARGET, **settings)


class TestOptions:
    def test_get_to_the_backend(self, own_tasks: Path) -> None:
        ask(
            own_tasks, batch_size="auto:2", device="cpu", dtype="bfloat16", num_fewshot=2,
            gen_kwargs="do_sample=True,top_p=0.5", model_args="max_length=77,some=thing",
        )  # fmt: skip
        (made,) = ASKED
        expected = {"pretrained": str(TARGET), "dtype": "bfloat16", "max_length": 77}
        assert made.items() >= {**expected, "some": "thing", "device": "cpu"}.items()
        assert str(made["batch_size"]) == "auto:2"
        assert "trust_remote_code" not in made
        prompt, generation = made["requests"][0]
        assert prompt.count("]=") == 3  # two examples and the question
        assert generation["do_sample"] is True
        assert generation["top_p"] == 0.5

    def test_code_runs_only_if_it_is_trusted(self, own_tasks: Path) -> None:
        ask(own_tasks, trust_remote_code=True)
        assert ASKED[0]["trust_remote_code"] is True

    def test_seeds_choose_examples(self, own_tasks: Path) -> None:
        prompts = []
        for seed in (1, 1, 2, 3, 4):
            ask(own_tasks, num_fewshot=1, seed=seed)
            prompts.append([request[0] for request in ASKED[0]["requests"]])
        assert prompts[0] == prompts[1]
        assert len({json.dumps(each) for each in prompts}) > 1

    def test_system_instruction_and_turns(self, own_tasks: Path) -> None:
        turns = {}
        for multiturn in (None, False):
            ask(
                own_tasks, DIRECT, apply_chat_template=True, system_instruction="Be brief.",
                num_fewshot=1, fewshot_as_multiturn=multiturn,
            )  # fmt: skip
            turns[multiturn] = json.loads(ASKED[0]["requests"][0][0])
        for history in turns.values():
            assert history[0] == {"role": "system", "content": "Be brief."}
        roles = {key: [turn["role"] for turn in history] for key, history in turns.items()}
        assert roles[None] == ["system", "user", "assistant", "user"]
        assert roles[False] == ["system", "user"]
        with pytest.raises(OptionError, match="needs a chat template"):
            ask(own_tasks, fewshot_as_multiturn=True)


class TestModels:
    def test_one_under_two_names_is_one(self, own_tasks: Path, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(TARGET)
        found = ask(own_tasks, link, DIRECT, baseline=TARGET)
        assert [row.model for row in found.rows] == [str(link), str(DIRECT)]
        assert found.baseline == str(link)
        with pytest.raises(OptionError, match="is given twice"):
            ask(own_tasks, link, TARGET)

    @pytest.mark.parametrize("label", [".", "..", "../target"])
    def test_named_by_dots_have_their_scores_in_the_output(
        self, own_tasks: Path, tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(TARGET, tmp_path / "target")
        (tmp_path / "target" / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "target" / ("sub" if label == ".." else "."))
        output = tmp_path / "out"
        ask(own_tasks, Path(label), output=output)
        written = {"target", "comparison.json", "report.html"}
        assert {path.name for path in output.iterdir()} == written
        assert ask(own_tasks, Path(label), output=output).reused == (str(Path(label)),)

    def test_a_target_that_the_diff_vector_does_not_fit_is_refused_before_any_scoring(
        self, diff: Path, own_tasks: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(TARGET, tmp_path / "other")
        tensors = load_file(tmp_path / "other" / "model.safetensors")
        tensors.pop("model.norm.weight")
        save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
        with pytest.raises(MatchError, match="give the graft it makes as a MODEL"):
            ask(own_tasks, tmp_path / "other", diff=diff)
        assert not ASKED

    def test_a_target_without_a_token_that_finetuned_uses_is_refused_before_any_scoring(
        self, diff: Path, own_tasks: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(TARGET, tmp_path / "other")
        for path in (tmp_path / "other").glob("*.json"):
            path.write_text(path.read_text("utf-8").replace("<|eos|>", "<|end|>"), "utf-8")
        with pytest.raises(VocabularyError, match="give the graft it makes as a MODEL"):
            ask(own_tasks, tmp_path / "other", diff=diff)
        assert not ASKED

    def test_a_target_that_is_unrelated_is_refused_before_any_scoring(
        self, diff: Path, own_tasks: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(TARGET, tmp_path / "other")
        path = tmp_path / "other" / "model.safetensors"
        drawn = torch.Generator().manual_seed(1)
        tensors = {
            name: torch.randn(tensor.shape, generator=drawn).to(tensor.dtype)
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(RelatednessError, match="give the graft it makes as a MODEL") as caught:
            ask(own_tasks, tmp_path / "other", diff=diff, output=tmp_path / "out")
        assert caught.value.roles == ("base", "target")
        assert not ASKED
        ask(own_tasks, tmp_path / "other")  # without a graft it is a model like any other
        assert len(ASKED) == 1


class TestOutput:
    @pytest.mark.parametrize("place", ["model", "model/scores", "diff"])
    def test_is_never_an_input(
        self, diff: Path, own_tasks: Path, tmp_path: Path, place: str
    ) -> None:
        shutil.copytree(TARGET, tmp_path / "model")
        shutil.copytree(diff, tmp_path / "diff")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputError, match="choose another --output"):
            ask(own_tasks, tmp_path / "model", diff=tmp_path / "diff", output=tmp_path / place)
        assert sorted(tmp_path.rglob("*")) == before

    def test_is_refused_at_once_where_nothing_can_be_written(self, own_tasks: Path) -> None:
        with pytest.raises(OutputError):
            ask(own_tasks, output="/proc/1")
        assert not ASKED

    def test_that_fails_at_the_end_loses_no_score(self, own_tasks: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        (output / "comparison.json").mkdir(parents=True)
        known: list[Evaluation] = []
        with pytest.raises(OutputError):
            ask(own_tasks, TARGET, DIRECT, output=output, salvage=known.append)
        assert len(known[0].rows) == 2

    def test_that_fails_in_between_loses_no_score(self, own_tasks: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.mkdir()
        (output / "target").write_text("in the way")
        known: list[Evaluation] = []
        with pytest.raises(OutputError):
            ask(own_tasks, TARGET, DIRECT, output=output, salvage=known.append)
        assert [row.model for row in known[0].rows] == [str(TARGET)]

    def test_is_not_used_after_code_beside_the_task_changed(
        self, own_tasks: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        (own_tasks / "helper.py").write_text("A = 1\n")
        ask(own_tasks, output=output)
        assert ask(own_tasks, output=output).reused
        (own_tasks / "helper.py").write_text("A = 2\n")
        assert not ask(own_tasks, output=output).reused

    @pytest.mark.parametrize("broken", ["fifo", "cycle", "deep", "huge", "link"])
    def test_that_somebody_broke_is_made_again(
        self, own_tasks: Path, tmp_path: Path, broken: str
    ) -> None:
        output = tmp_path / "out"
        ask(own_tasks, output=output)
        (results,) = output.rglob("results_*.json")
        (samples,) = output.rglob("samples_*.jsonl")
        if broken == "fifo":
            samples.unlink()
            os.mkfifo(samples)
        elif broken == "link":
            samples.rename(tmp_path / "elsewhere")
            samples.symlink_to(tmp_path / "elsewhere")
        elif broken == "cycle":
            document = json.loads(results.read_text())
            document["group_subtasks"] = {"written": ["written"]}
            results.write_text(json.dumps(document))
        elif broken == "deep":
            samples.write_text("[" * 100_000 + "]" * 100_000)
        else:
            lines = [json.loads(line) for line in samples.read_text().splitlines()]
            text = "".join(json.dumps({**line, "exact_match": 7}) + "\n" for line in lines)
            samples.write_text(text.replace('"exact_match": 7', '"exact_match": 1' + "0" * 400))
        again = ask(own_tasks, output=output)
        assert not again.reused
        assert len(again.warnings) == 1
        assert len(again.rows) == 1


def test_a_score_that_is_no_number_is_seen(
    own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (own_tasks / "chosen.yaml").read_text()
    text = text.replace("multiple_choice", "loglikelihood").replace('"0"', '"{{question}}"')
    text = text.replace('doc_to_choice: "{{choices}}"\n', "")
    (own_tasks / "chosen.yaml").write_text(text.replace("acc", "perplexity"))
    monkeypatch.setenv("ODD", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    found = ask(own_tasks, TARGET, DIRECT, tasks="chosen", output=tmp_path / "out")
    rows = [row for row in found.rows if row.metric == "perplexity"]
    assert len(rows) == 2
    assert all(math.isnan(row.value) for row in rows)
    assert rows[1].p_value is None
    assert rows[1].notes
    written = (tmp_path / "out" / "comparison.json").read_text()
    assert "NaN" not in written
    assert [row["value"] for row in json.loads(written)["rows"]] == [None, None]


def test_a_group_and_a_task_of_it_are_refused(own_tasks: Path) -> None:
    (own_tasks / "both.yaml").write_text("group: both\ntask: [written, chosen]\n")
    with pytest.raises(OptionError, match="written is in both and in written; name one of them"):
        ask(own_tasks, tasks="both,written")


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_has_is_not(tmp_path: Path) -> None:
    (tmp_path / ".diffxfer-scratch-dead").mkdir()
    (tmp_path / ".diffxfer-scratch-dead" / "weights").write_text("left")
    with scratch_folder(tmp_path) as live, scratch_folder(tmp_path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([live, other])
    assert not list(tmp_path.iterdir())


def test_norms_are_those_of_the_tensors(diff: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    extract_diff(DIRECT, TARGET, tmp_path / "diff", diff_dtype="float32")
    kinds = norms_by_kind(tmp_path / "diff")
    delta = load_file(tmp_path / "diff" / "model.safetensors")
    base = load_file(TARGET / "model.safetensors")
    names = [name for name in delta if "mlp.up_proj" in name]
    found = kinds["model.layers.*.mlp.up_proj.weight"]
    assert found.tensors == len(names) == 4
    for tensors, norm in ((delta, found.delta), (base, found.base)):
        squares = sum(tensors[name].double().square().sum().item() for name in names)
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-7)  # Δ was rounded to float32 since
    assert list(kinds)[-1] == "all"
    assert kinds["all"].tensors == len(delta)


def test_apply_at_alpha_zero_lends_a_template(diff: Path, own_tasks: Path, tmp_path: Path) -> None:
    apply_diff(diff, TARGET, tmp_path / "lent", alpha=0)
    with pytest.raises(DiffxferError, match="omit that option, or give --diff"):
        ask(own_tasks, TARGET, apply_chat_template=True)
    assert (tmp_path / "lent" / "chat_template.jinja").exists()


def test_the_best_alpha_is_one_that_has_a_number() -> None:
    def graft(alpha: float, value: float) -> Row:
        return Row(
            *("m", alpha, "t", "acc", "none", value, None, 9, True, "m"),
            *(None, None, None, None, ()),
        )

    column = [("t", "acc", "none")]
    found = best_alpha([graft(0.5, 0.2), graft(1.0, math.nan)], column, "d", "m")
    assert found is not None
    assert found.alpha == 0.5
    assert best_alpha([graft(0.5, math.nan), graft(1.0, math.nan)], column, "d", "m") is None
