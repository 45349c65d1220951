"""Scoring models and grafts: the values of lm-eval, the grafts of apply, and reused scores."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401 its own backends come first, or it takes ours for all there are
import pytest
import xxhash
from lm_eval import simple_evaluate
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from diffxfer import Evaluation, apply_diff, evaluate, extract_diff
from diffxfer.errors import DiffxferError, EvaluationError, OptionError
from diffxfer.evaluation.content_hash import content_hash
from diffxfer.evaluation.lm_eval_results import read_scores
from diffxfer.evaluation.paired_statistics import compare_scores, recovered_share
from tests.evaluation.conftest import FAMILY, QUICK

if TYPE_CHECKING:
    from tests.hub.forks import Forks

TARGET, DIRECT, FINETUNED = (FAMILY / name for name in ("target", "direct", "finetuned"))
ALPHAS = (0.8, 1.0, 1.2)
LIMIT = 24


def digest_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SEEN: list[tuple[str, dict[str, str]]] = []


@register_model("remembers")
class Remembers(LM):
    """A backend that answers nothing and records every file that it was given."""

    def __init__(self, pretrained: str, **_: Any) -> None:
        super().__init__()
        SEEN.append((pretrained, digest_of(Path(pretrained))))

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        return [(0.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        return [0.0 for _ in requests]

    def generate_until(self, requests: Any) -> list[str]:
        return ["" for _ in requests]


@pytest.fixture(scope="module")
def grafts(tmp_path_factory: pytest.TempPathFactory, diff: Path) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("grafts")
    # The card has the name of the folder, so these folders are named as `evaluate` names them.
    made = {alpha: folder / f"target+{alpha:g}" for alpha in ALPHAS}
    for alpha, out in made.items():
        apply_diff(diff, TARGET, out, alpha=alpha)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, diff: Path) -> tuple[Evaluation, Path]:
    """Target, three grafts and the directly fine-tuned target, on a task of each kind."""
    output = tmp_path_factory.mktemp("scores") / "out"
    tasks = ["pig_latin", "pig_latin_choice", "docstrings"]
    found = evaluate(
        TARGET,
        diff=diff,
        alpha=ALPHAS,
        finetuned=DIRECT,
        tasks=tasks,
        limit=LIMIT,
        output=output,
        **QUICK,
    )
    return found, output


class TestTheValues:
    def test_are_those_of_lm_eval_called_directly(
        self, whole: tuple[Evaluation, Path], grafts: dict[float, Path]
    ) -> None:
        folders = {(str(TARGET), None): TARGET, (str(DIRECT), None): DIRECT}
        folders |= {(str(TARGET), alpha): folder for alpha, folder in grafts.items()}
        manager = TaskManager(include_path=str(FAMILY / "tasks"), include_defaults=False)
        for (model, alpha), folder in folders.items():
            results = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": "float32"},
                tasks=["pig_latin", "pig_latin_choice", "docstrings"],
                task_manager=manager,
                batch_size=64,
                device="cpu",
                limit=LIMIT,
            )
            rows = [row for row in whole[0].rows if (row.model, row.alpha) == (model, alpha)]
            assert len(rows) == 3
            for row in rows:
                theirs = results["results"][row.task]
                assert row.value == theirs[f"{row.metric},none"]
                stderr = theirs[f"{row.metric}_stderr,none"]
                assert row.stderr == (None if stderr == "N/A" else stderr)
                assert row.n == LIMIT

    def test_come_in_the_order_in_which_models_and_tasks_were_named(
        self, whole: tuple[Evaluation, Path]
    ) -> None:
        rows = whole[0].rows
        models = list(dict.fromkeys((row.model, row.alpha) for row in rows))
        grafts = [(str(TARGET), alpha) for alpha in ALPHAS]
        assert models == [(str(TARGET), None), *grafts, (str(DIRECT), None)]
        columns = [column[0] for column in whole[0].columns]
        assert columns == ["pig_latin", "pig_latin_choice", "docstrings"]

    def test_tell_better_from_worse(self, whole: tuple[Evaluation, Path]) -> None:
        better = {row.task: row.higher_is_better for row in whole[0].rows}
        assert better == {"pig_latin": True, "pig_latin_choice": True, "docstrings": False}
        best = whole[0].best
        assert best is not None
        assert (best.alpha, best.task, best.metric) == (1.0, "pig_latin", "exact_match")
        assert best.command.endswith(f"{TARGET} -o OUT --alpha 1.0")

    def test_have_p_values_and_recovered_shares_but_for_the_models_they_are_measured_by(
        self, whole: tuple[Evaluation, Path]
    ) -> None:
        for row in whole[0].rows:
            if row.model == str(TARGET) and row.alpha is None:
                assert (row.delta, row.p_value, row.recovered) == (None, None, None)
            elif row.model == str(DIRECT):
                assert row.p_value is not None
                assert row.recovered is None
            else:
                assert row.delta is not None
                assert row.p_value is not None
                assert row.baseline == str(TARGET)

    def test_recovered_is_the_share_of_the_gain(self, whole: tuple[Evaluation, Path]) -> None:
        values = {(r.model, r.alpha): r.value for r in whole[0].rows if r.task == "pig_latin"}
        target, direct = values[str(TARGET), None], values[str(DIRECT), None]
        for row in whole[0].rows:
            if row.task == "pig_latin" and row.alpha is not None:
                assert row.recovered == (row.value - target) / (direct - target)
                assert row.recovered_interval is not None
                low, high = row.recovered_interval
                assert low <= row.recovered <= high


def test_grafts_are_what_apply_writes_and_are_gone_afterwards(
    diff: Path, grafts: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    SEEN.clear()
    evaluate(
        TARGET, diff=diff, alpha=ALPHAS, tasks="pig_latin", limit=2, backend="remembers",
        include_path=FAMILY / "tasks",
    )  # fmt: skip
    (model, _), *made = SEEN
    assert model == str(TARGET)
    assert [files for _, files in made] == [digest_of(grafts[alpha]) for alpha in ALPHAS]
    assert not any(Path(folder).exists() for folder, _ in made)
    assert list(tmp_path.iterdir()) == []
    assert all(Path(folder).is_relative_to(tmp_path) for folder, _ in made)


@register_model("breaks")
class Breaks(Remembers):
    """A model that fails at the second folder it is given."""

    def generate_until(self, requests: Any) -> list[str]:
        if len(SEEN) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().generate_until(requests)


def test_a_graft_is_gone_after_a_failure_too_and_what_was_scored_is_kept(
    diff: Path, tmp_path: Path
) -> None:
    SEEN.clear()
    known: list[Evaluation] = []
    with pytest.raises(EvaluationError, match="does not fit in memory at batch size 7") as caught:
        evaluate(
            TARGET, diff=diff, tasks="pig_latin", limit=2, backend="breaks", batch_size=7,
            include_path=FAMILY / "tasks", output=tmp_path / "out", salvage=known.append,
        )  # fmt: skip
    assert "--batch-size" in caught.value.remedy
    assert [row.alpha for row in known[-1].rows] == [None]
    assert len(list((tmp_path / "out").glob("*/results_*.json"))) == 1
    assert not list((tmp_path / "out").glob(".*"))
    assert (tmp_path / "out" / "target").is_dir()


def test_a_target_without_chat_template_is_lent_finetuneds(
    diff: Path, own_tasks: Path, grafts: dict[float, Path]
) -> None:
    data = (own_tasks / "written.yaml").read_text().replace("[{{question}}]=", "{{question}}")
    (own_tasks / "written.yaml").write_text(data)
    said: list[str] = []
    found = evaluate(
        TARGET, diff=diff, tasks="written", apply_chat_template=True, progress=said.append,
        **{**QUICK, "include_path": own_tasks},
    )  # fmt: skip
    assert [line for line in said if "has no chat template: that of" in line]
    assert [(row.alpha, row.value) for row in found.rows] == [(None, 0.0), (1.0, 1.0)]
    # lm-eval reports the same for the graft, whose template the target used.
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    results = simple_evaluate(
        model="hf", model_args={"pretrained": str(grafts[1.0]), "dtype": "float32"},
        tasks=["written"], task_manager=manager, device="cpu", apply_chat_template=True,
    )  # fmt: skip
    assert results["results"]["written"]["exact_match,none"] == 1.0


class TestTheOutput:
    def test_has_lm_evals_files_for_each_model(self, whole: tuple[Evaluation, Path]) -> None:
        _, output = whole
        folders = [folder for folder in output.iterdir() if folder.is_dir()]
        assert len(folders) == 5
        for folder in folders:
            (results,) = folder.glob("results_*.json")
            native = json.loads(results.read_text())
            assert native["config"]["model"] == "hf"
            assert native["lm_eval_version"]
            for task in ("pig_latin", "pig_latin_choice", "docstrings"):
                (samples,) = folder.glob(f"samples_{task}_2*.jsonl")
                assert len(samples.read_text().splitlines()) == LIMIT

    def test_has_the_comparison(self, whole: tuple[Evaluation, Path]) -> None:
        found, output = whole
        written = json.loads((output / "comparison.json").read_text())
        assert written == json.loads(json.dumps(found.as_json()))
        wanted = "model alpha task metric filter value stderr n baseline delta p_value recovered"
        assert set(wanted.split()) <= written["rows"][0].keys()

    def test_has_the_page(self, whole: tuple[Evaluation, Path]) -> None:
        found, output = whole
        page = (output / "report.html").read_text("utf-8")
        for row in found.rows:
            assert f"{row.value:.4f}" in page
        assert str(TARGET.parent) not in page
        assert str(output.parent) not in page

    def test_names_what_was_scored_by_its_content(
        self, whole: tuple[Evaluation, Path], grafts: dict[float, Path]
    ) -> None:
        contents = {(row.model, row.alpha): row.content for row in whole[0].rows}
        assert contents[str(TARGET), None] == content_hash(TARGET)
        for alpha in ALPHAS:
            assert contents[str(TARGET), alpha] == content_hash(grafts[alpha])

    def test_is_used_again(self, whole: tuple[Evaluation, Path], diff: Path) -> None:
        before, output = whole
        files = digest_of(output)
        said: list[str] = []
        again = evaluate(
            TARGET, diff=diff, alpha=ALPHAS, finetuned=DIRECT, limit=LIMIT, output=output,
            tasks=["pig_latin", "pig_latin_choice", "docstrings"], progress=said.append, **QUICK,
        )  # fmt: skip
        assert again.rows == before.rows
        assert len(again.reused) == 5
        assert not [line for line in said if line.startswith("scoring")]
        assert len([line for line in said if "reused" in line]) == 5
        files.pop("comparison.json")
        assert {name: hash_ for name, hash_ in digest_of(output).items() if name in files} == files

    def test_is_used_for_one_task_of_several_and_for_a_copy_of_the_model(
        self, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        evaluate(TARGET, tasks="pig_latin", limit=4, output=output, **QUICK)
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in TARGET.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        said: list[str] = []
        found = evaluate(
            copy, tasks=["pig_latin", "pig_latin_choice"], limit=4, output=output,
            progress=said.append, **QUICK,
        )  # fmt: skip
        assert [line for line in said if line.startswith("scoring")] == [
            f"scoring {copy} (1 of 1) on pig_latin_choice"
        ]
        assert [row.task for row in found.rows] == ["pig_latin", "pig_latin_choice"]

    @pytest.mark.parametrize("change", ["weights", "companion", "limit", "dtype", "samples"])
    def test_is_not_used_for_anything_else(self, tmp_path: Path, change: str) -> None:
        model, output = tmp_path / "model", tmp_path / "out"
        model.mkdir()
        for path in TARGET.iterdir():
            (model / path.name).write_bytes(path.read_bytes())
        settings: dict[str, Any] = {"tasks": "pig_latin", "limit": 4, "output": output, **QUICK}
        evaluate(model, **settings)
        if change == "weights":
            data = bytearray((model / "model.safetensors").read_bytes())
            data[-1] ^= 1
            (model / "model.safetensors").write_bytes(data)
        elif change == "companion":
            (model / "chat_template.jinja").write_text("{{ messages }}")
        elif change == "samples":
            (samples,) = output.rglob("samples_*.jsonl")
            samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-1]))
        else:
            settings |= {"limit": {"limit": 5, "dtype": 4}[change]}
            settings |= {"dtype": {"limit": "float32", "dtype": "bfloat16"}[change]}
        said: list[str] = []
        found = evaluate(model, progress=said.append, **settings)
        assert [line for line in said if line.startswith("scoring")]
        assert found.reused == ()
        assert bool(found.warnings) is (change == "samples")

    def test_of_a_changed_question_is_not_used(self, own_tasks: Path, tmp_path: Path) -> None:
        settings: dict[str, Any] = {**QUICK, "include_path": own_tasks, "output": tmp_path / "out"}
        evaluate(TARGET, tasks="written", **settings)
        (own_tasks / "data.py").write_text(
            (own_tasks / "data.py").read_text().replace("maybe", "perhaps")
        )
        assert evaluate(TARGET, tasks="written", **settings).reused == ()
        assert evaluate(TARGET, tasks="written", **settings).reused == (str(TARGET),)


def test_a_killed_run_continues_without_scoring_the_first_model_again(
    warm: Forks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [
        *("eval", TARGET, FINETUNED, DIRECT, "--limit", "20", "--batch-size", "2", "-o", output),
        *("--tasks", "pig_latin", "--include-path", FAMILY / "tasks", "--device", "cpu"),
        *("--dtype", "float32"),
    ]
    stop = (output, "*/results_*.json", signal.SIGKILL)
    killed = warm.run(*command, cwd=tmp_path, env={}, stop=stop)
    assert killed.returncode == -signal.SIGKILL
    assert not (output / "report.html").exists()
    (first,) = output.glob("*/results_*.json")
    before = first.read_bytes()
    done = warm.run(*command, cwd=tmp_path, env={})
    assert done.returncode == 0, done.stderr
    assert f"{TARGET}: scores on pig_latin are reused from {output}" in done.stderr
    assert f"scoring {TARGET} " not in done.stderr
    assert f"scoring {FINETUNED} (2 of 3) on pig_latin" in done.stderr
    assert first.read_bytes() == before
    assert len(list(output.glob("*/results_*.json"))) == 3
    assert (output / "comparison.json").exists()
    assert (output / "report.html").exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".partial")]


def test_p_value_and_share_are_those_of_the_samples(
    whole: tuple[Evaluation, Path], grafts: dict[float, Path]
) -> None:
    _, output = whole
    by_label = {}
    for path in output.glob("*/results_*.json"):
        results = json.loads(path.read_text())
        label = results["diffxfer"]["model"], results["diffxfer"]["alpha"]
        stamp = path.stem.removeprefix("results_")
        lines = (path.parent / f"samples_pig_latin_{stamp}.jsonl").read_text().splitlines()
        right = [json.loads(line)["exact_match"] for line in lines]
        by_label[label] = right
    target = by_label[str(TARGET), None]
    graft = by_label[str(TARGET), 0.8]
    lost = sum(a > b for a, b in zip(target, graft, strict=True))
    won = sum(a < b for a, b in zip(target, graft, strict=True))
    # The exact two-sided binomial test with p = 1/2, term by term.
    from math import comb

    tail = sum(comb(lost + won, k) for k in range(min(lost, won) + 1))
    by_hand = min(1.0, 2 * tail / 2 ** (lost + won))
    (row,) = [r for r in whole[0].rows if r.task == "pig_latin" and r.alpha == 0.8]
    assert row.p_value == pytest.approx(by_hand, rel=1e-12)
    assert row.delta == pytest.approx((won - lost) / LIMIT)


class TestErrors:
    def one_line(self, caught: pytest.ExceptionInfo[DiffxferError]) -> str:
        text = str(caught.value)
        assert "\n" not in text
        return text

    def test_unknown_task(self) -> None:
        with pytest.raises(EvaluationError) as caught:
            evaluate(TARGET, tasks="pig_latn", **QUICK)
        assert "did you mean pig_latin" in self.one_line(caught)

    def test_data_that_cannot_be_had(self, own_tasks: Path) -> None:
        text = (own_tasks / "written.yaml").read_text()
        text = text.replace("custom_dataset: !function data.written", "dataset_path: gone/words")
        (own_tasks / "written.yaml").write_text(text)
        with pytest.raises(EvaluationError, match="its data cannot be loaded") as caught:
            evaluate(TARGET, tasks="written", include_path=own_tasks)
        assert "unset HF_HUB_OFFLINE" in self.one_line(caught)

    def test_no_cuda(self) -> None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
        with pytest.raises(EvaluationError, match="finds no CUDA device; give --device cpu"):
            evaluate(TARGET, tasks="pig_latin", **{**QUICK, "device": "cuda"})

    def test_chat_template_where_there_is_none(self) -> None:
        with pytest.raises(EvaluationError, match="has no chat template") as caught:
            evaluate(TARGET, tasks="pig_latin", apply_chat_template=True, **QUICK)
        assert str(TARGET) in self.one_line(caught)

    def test_chat_template_where_neither_the_target_nor_the_diff_vector_has_one(
        self, tmp_path: Path
    ) -> None:
        extract_diff(TARGET, FAMILY / "base", tmp_path / "diff")
        with pytest.raises(EvaluationError, match="has no chat template"):
            evaluate(
                TARGET, diff=tmp_path / "diff", tasks="written", apply_chat_template=True, **QUICK
            )

    def test_vocabulary_larger_than_the_embedding(self, tmp_path: Path) -> None:
        for path in TARGET.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
        last = max(token["id"] for token in tokenizer["added_tokens"])
        extra = {**tokenizer["added_tokens"][-1], "id": max(last, 258) + 1, "content": "<|more|>"}
        tokenizer["added_tokens"].append(extra)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(EvaluationError, match="260 tokens, but its embedding has 259 rows"):
            evaluate(tmp_path, tasks="pig_latin", **QUICK)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"tasks": []}, "names no task"),
            ({"limit": 0}, "neither a number of questions"),
            ({"limit": 2.5}, "neither a number of questions"),
            ({"batch_size": "many"}, "not a batch size"),
            ({"num_fewshot": -1}, "below 0"),
            ({"seed": "1,2"}, "expected 1 or 4"),
            ({"seed": "x"}, "not a seed"),
            ({"alpha": 0.5}, "none is given"),
            ({"alpha": [1.0]}, "none is given"),
            ({"dtype": "fp16"}, "'fp16' is unknown"),
            ({"seed": -1}, "not a seed"),
            ({"tasks": " , "}, "names no task"),
            ({"model_args": "device=cpu"}, "has a separate option"),
            ({"model_args": "max_length"}, "not of the form key=value"),
            ({"fewshot_as_multiturn": True}, "needs a chat template"),
            ({"backend": "vlm"}, "did you mean vllm"),
            ({"device": "tpu9"}, "not a device"),
            ({"include_path": "nowhere"}, "not a folder"),
        ],
    )
    def test_options_that_mean_nothing(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message) as caught:
            evaluate(TARGET, **{"tasks": "pig_latin", **QUICK, **settings})
        self.one_line(caught)

    def test_a_model_twice(self) -> None:
        with pytest.raises(OptionError, match="is given twice"):
            evaluate([TARGET, TARGET], tasks="pig_latin", **QUICK)

    def test_a_diff_vector_for_a_model(self, diff: Path) -> None:
        with pytest.raises(DiffxferError, match="is a diff vector"):
            evaluate([TARGET, diff], tasks="pig_latin", **QUICK)

    def test_a_model_for_a_diff_vector(self) -> None:
        with pytest.raises(DiffxferError, match="is a model, expected a diff vector"):
            evaluate(TARGET, diff=DIRECT, tasks="pig_latin", **QUICK)


def test_groups_have_a_score_of_their_own_and_a_p_value(own_tasks: Path) -> None:
    (own_tasks / "both.yaml").write_text(
        "group: both\ntask: [written, chosen]\naggregate_metric_list:\n"
        "  - {metric: acc, weight_by_size: true}\nmetadata: {version: 1.0}\n"
    )
    text = (own_tasks / "written.yaml").read_text()
    (own_tasks / "written.yaml").write_text(text.replace("metric: exact_match", "metric: acc"))
    (own_tasks / "written.yaml").write_text(
        (own_tasks / "chosen.yaml").read_text().replace("task: chosen", "task: written")
    )
    found = evaluate([TARGET, DIRECT], tasks="both", **{**QUICK, "include_path": own_tasks})
    assert [column[0] for column in found.columns] == ["both"]
    group = [row for row in found.rows if row.task == "both"]
    assert [row.n for row in group] == [6, 6]
    assert group[1].p_value is not None
    assert {row.task for row in found.rows} == {"both", "written", "chosen"}


def test_lm_evals_own_index_is_not_read_where_ones_own_tasks_serve(own_tasks: Path) -> None:
    from diffxfer.evaluation.eval_settings import make_settings
    from diffxfer.evaluation.lm_eval_tasks import find_tasks

    def index(tasks: list[str]) -> list[str]:
        settings = make_settings(
            tasks=tasks, include_path=own_tasks, num_fewshot=None, limit=None, batch_size=1,
            device=None, dtype="auto", apply_chat_template=False, fewshot_as_multiturn=None,
            system_instruction=None, gen_kwargs=None, backend="hf", model_args=None, seed=None,
            trust_remote_code=False,
        )  # fmt: skip
        return list(find_tasks(settings, fingerprint=False).manager.all_tasks)

    assert index(["written", "cho*"]) == ["chosen", "written"]
    assert index([str(own_tasks / "chosen.yaml")]) == ["chosen", "written"]


def test_the_library_and_its_statistics_agree(whole: tuple[Evaluation, Path]) -> None:
    found, output = whole
    scores = {}
    for path in output.glob("*/results_*.json"):
        results = json.loads(path.read_text())
        stamp = path.stem.removeprefix("results_")
        samples = {
            task: [
                json.loads(line)
                for line in (path.parent / f"samples_{task}_{stamp}.jsonl").read_text().splitlines()
            ]
            for task in results["n-samples"]
        }
        label = results["diffxfer"]["model"], results["diffxfer"]["alpha"]
        scores[label] = {score.column: score for score in read_scores(results, samples)}
    target, direct = scores[str(TARGET), None], scores[str(DIRECT), None]
    for row in found.rows:
        if row.alpha is not None:
            score = scores[row.model, row.alpha][row.column]
            assert row.p_value == compare_scores(score, target[row.column]).p_value
            recovery = recovered_share(score, target[row.column], direct[row.column])
            assert (row.recovered, row.recovered_interval) == (recovery.share, recovery.interval)


def test_environment_is_left_as_it_was() -> None:
    before = dict(os.environ)
    evaluate(TARGET, tasks="pig_latin", limit=1, **QUICK)
    assert dict(os.environ) == before


def test_every_request_is_counted_and_said_of_whom(tmp_path: Path, diff: Path) -> None:
    told: list[tuple[str, int, int]] = []
    opened: list[Path] = []
    evaluate(
        TARGET,
        diff=diff,
        alpha=1.0,
        tasks="pig_latin,pig_latin_choice",
        limit=4,
        output=tmp_path / "scores",
        answered=lambda *what: told.append(what),
        opened=opened.append,
        **QUICK,  # type: ignore[arg-type]
    )
    assert opened == [tmp_path / "scores"]
    names = list(dict.fromkeys(name for name, _, _ in told))
    assert names == ["target (1/2)", "target + 1.0·Δ (2/2)"]
    for name in names:
        counts = [(done, total) for each, done, total in told if each == name]
        assert counts[0] == (0, 0)  # before the model is loaded
        # Four words to write, and four with three answers each to choose from.
        asked = [done for done, total in counts if total == 16]
        assert asked == list(range(17))
    # The counting methods are restored.
    assert CacheHook.add_partial.__qualname__ == "CacheHook.add_partial"
    assert Task.build_all_requests.__qualname__ == "Task.build_all_requests"
