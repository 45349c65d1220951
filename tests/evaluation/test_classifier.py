"""The backend for classifiers: transformers' own answers, and grafts as an independent sum."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tokenizers import processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
)

from diffxfer import Evaluation, apply_diff, evaluate, extract_diff
from diffxfer.errors import CheckpointError, DiffxferError, EvaluationError, OptionError
from diffxfer.evaluation.classifier import ClassifierLM
from diffxfer.evaluation.head_labels import labels_in, match_choices
from tests import families, tiny
from tests.evaluation.conftest import FAMILY

GUIDE = Path(__file__).parents[2] / "examples" / "evaluation" / "README.md"
LABELS = ["docs", "code", "news"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
CONFIGS = {
    "roberta": RobertaConfig(**SIZES, **NAMES, bos_token_id=None, eos_token_id=None),
    "bert": BertConfig(**SIZES, **NAMES),
    "llama": families.llama(**NAMES, pad_token_id=30),
}
TEXTS = [" ".join(f"w{(7 * i + j * j) % 30}" for j in range(1 + i % 9)) for i in range(12)]
LONG = [" ".join(f"w{(3 * i + j) % 30}" for j in range(30)) for i in range(4)]
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: {choices}
metric_list: [{{metric: acc}}]
{more}
"""


def save_task(
    folder: Path,
    name: str = "kinds",
    texts: list[str] = TEXTS,
    choices: list[str] = LABELS,
    more: str = "",
) -> Path:
    """A task of rows with labels, in a folder of tasks."""
    folder.mkdir(exist_ok=True)
    rows = folder / f"{name}.jsonl"
    labelled = [{"text": t, "label": choices[i % len(choices)]} for i, t in enumerate(texts)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    text = YAML.format(name=name, rows=rows, choices=json.dumps(choices), more=more)
    (folder / f"{name}.yaml").write_text(text)
    return folder


def save_classifier(
    folder: Path, kind: str, seed: int = 0, *, auto: Any = AutoModelForSequenceClassification
) -> Path:
    model = auto.from_config(CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # wide, so that the class depends on the text
                shared = torch.Generator().manual_seed(crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=shared) * 0.9)
            own = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
            parameter += torch.randn(parameter.shape, generator=own) * 0.05
    model.save_pretrained(folder)
    tokenizer = families.fast_tokenizer(["<pad>", "<s>", "</s>"])
    if kind != "llama":
        pair = "<s> $A </s> </s> $B </s>"
        tokens = [("<s>", 31), ("</s>", 32)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair=pair, special_tokens=tokens
        )
    return families.save_tokenizer(folder, tokenizer, pad_token="<pad>")


def ask(models: Any, folder: Path, **more: Any) -> Evaluation:
    settings = {"tasks": "kinds", "include_path": folder, "backend": "classifier", "device": "cpu"}
    return evaluate(models, **{**settings, "batch_size": 4, **more})


def samples_of(output: Path, model: str) -> list[dict[str, Any]]:
    (path,) = (output / model).glob("samples_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda sample: int(sample["doc_id"]))


def answers_of(output: Path, model: str) -> torch.Tensor:
    """The answers that lm-eval recorded: `(row, class)`, in the order of the choices."""
    rows = [sample["filtered_resps"] for sample in samples_of(output, model)]
    return torch.tensor([[float(value) for value, _ in row] for row in rows], dtype=torch.float64)


def expected_logits(
    folder: Path, texts: list[str] = TEXTS, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """transformers' own logits, text by text, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in texts])


def assert_answers(answers: torch.Tensor, logits: torch.Tensor) -> None:
    """The same classes as transformers' logits, with the same log-probabilities."""
    assert torch.equal(answers.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(answers, logits.double().log_softmax(-1), rtol=0, atol=2e-5)


def requests_of(texts: list[str], choices: list[str] = LABELS) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (text, f" {choice}"), idx, ("kinds", doc, 1))
        for doc, text in enumerate(texts)
        for idx, choice in enumerate(choices)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("one") / "roberta", "roberta")


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, finetuned and target, all classifiers, with the diff vector."""
    root = tmp_path_factory.mktemp("family")
    for seed, role in enumerate(("base", "finetuned", "target")):
        save_classifier(root / role, request.param, seed)
    extract_diff(root / "finetuned", root / "base", root / "diff", diff_dtype="float64")
    return root


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and target are masked language models; finetuned is a classifier."""
    root = tmp_path_factory.mktemp("encoders")
    save_classifier(root / "base", "roberta", 0, auto=AutoModelForMaskedLM)
    save_classifier(root / "finetuned", "roberta", 1)
    save_classifier(root / "target", "roberta", 2, auto=AutoModelForMaskedLM)
    save_classifier(root / "direct", "roberta", 3)
    extract_diff(root / "finetuned", root / "base", root / "diff", added="bring")
    extract_diff(root / "finetuned", root / "base", root / "headless", added="drop")
    return root


class TestAnswers:
    def test_are_those_of_transformers(self, family: Path, tasks: Path, tmp_path: Path) -> None:
        found = ask(family / "target", tasks, output=tmp_path / "out")
        answers = answers_of(tmp_path / "out", "target")
        logits = expected_logits(family / "target")
        assert_answers(answers, logits)
        assert len(set(logits.argmax(-1).tolist())) > 1
        samples = samples_of(tmp_path / "out", "target")
        greedy = [
            [said == "True" or said is True for _, said in s["filtered_resps"]] for s in samples
        ]
        assert [row.index(True) for row in greedy] == logits.argmax(-1).tolist()
        assert all(sum(row) == 1 for row in greedy)
        right = logits.argmax(-1) == torch.arange(len(TEXTS)) % len(LABELS)
        (row,) = found.rows
        assert (row.metric, row.value, row.n) == ("acc", right.double().mean().item(), len(TEXTS))

    def test_of_a_graft_are_those_of_the_sum(
        self, family: Path, tasks: Path, tmp_path: Path
    ) -> None:
        found = ask(
            family / "target", tasks, diff=family / "diff", alpha=0.75, output=tmp_path / "o"
        )
        assert [row.alpha for row in found.rows] == [None, 0.75]
        model = AutoModelForSequenceClassification.from_pretrained(family / "target").eval()
        base, finetuned, target = (
            AutoModelForSequenceClassification.from_pretrained(family / role).state_dict()
            for role in ("base", "finetuned", "target")
        )
        total = {
            name: (t.double() + 0.75 * (finetuned[name].double() - base[name].double())).to(t.dtype)
            if t.is_floating_point()
            else t
            for name, t in target.items()
        }
        model.load_state_dict(total)
        tokenizer = AutoTokenizer.from_pretrained(family / "target")
        with torch.no_grad():
            logits = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in TEXTS])
        answers = answers_of(tmp_path / "o", "target+0.75")
        assert_answers(answers, logits)
        assert not torch.allclose(answers, answers_of(tmp_path / "o", "target"), atol=1e-3)

    @pytest.mark.parametrize("size", [1, 5, "auto"])
    def test_do_not_depend_on_batches(self, family: Path, size: int | str) -> None:
        found = ClassifierLM(family / "target", batch_size=size, device="cpu")
        answers = found.loglikelihood(requests_of(TEXTS))
        values = torch.tensor([value for value, _ in answers], dtype=torch.float64)
        assert_answers(values.view(-1, len(LABELS)), expected_logits(family / "target"))

    def test_halve_an_automatic_batch_that_does_not_fit(
        self, roberta: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = ClassifierLM(roberta, batch_size="auto", device="cpu")
        expected = found.loglikelihood(requests_of(TEXTS))
        forward, sizes = found._forward, []

        def too_small(inputs: Any) -> torch.Tensor:
            sizes.append(len(inputs))
            if len(inputs) > 3:
                raise RuntimeError("CUDA out of memory")
            return forward(inputs)

        monkeypatch.setattr(found, "_forward", too_small)
        answers = found.loglikelihood(requests_of(TEXTS))
        assert sizes == [12, 6, 3, 3, 3, 3]
        assert [best for _, best in answers] == [best for _, best in expected]

    @pytest.mark.parametrize("padding", [None, 7])
    def test_of_a_decoder_whose_config_has_another_pad_token(
        self, padding: int | None, tmp_path: Path
    ) -> None:
        """Its head reads the last token that is not padding, which the tokenizer knows."""
        model = save_classifier(tmp_path / "llama", "llama")
        expected = expected_logits(model)
        path = model / "config.json"
        tiny.write_json(path, {**json.loads(path.read_text()), "pad_token_id": padding})
        found = ClassifierLM(model, batch_size=5, device="cpu")
        answers = found.loglikelihood(requests_of(TEXTS))
        values = torch.tensor([value for value, _ in answers], dtype=torch.float64)
        assert_answers(values.view(-1, len(LABELS)), expected)

    def test_are_float32_from_logits_of_another_dtype(self, family: Path) -> None:
        found = ClassifierLM(family / "target", device="cpu", dtype="bfloat16")
        answers = found.loglikelihood(requests_of(TEXTS))
        values = torch.tensor([value for value, _ in answers], dtype=torch.float64)
        logits = expected_logits(family / "target", dtype=torch.bfloat16)
        assert logits.dtype == torch.bfloat16
        assert_answers(values.view(-1, len(LABELS)), logits.float())

    def test_in_another_order_of_choices(self, roberta: Path, tmp_path: Path) -> None:
        tasks = save_task(tmp_path / "tasks", choices=["news", "docs", "code"])
        ask(roberta, tasks, output=tmp_path / "out")
        answers = answers_of(tmp_path / "out", "roberta")
        assert answers.argmax(-1).tolist() == [
            [2, 0, 1].index(best) for best in expected_logits(roberta).argmax(-1).tolist()
        ]

    def test_count_the_right_answers_of_groups(self, roberta: Path, tmp_path: Path) -> None:
        """Two tasks ask the same texts, and one of them also asks without a text."""
        tasks = save_task(tmp_path / "tasks")
        metric = "metric_list: [{metric: acc}, {metric: acc_mutual_info}]"
        save_task(tasks, "again", more=metric)
        found = ask(roberta, tasks, tasks="kinds,again")
        right = expected_logits(roberta).argmax(-1) == torch.arange(len(TEXTS)) % len(LABELS)
        values = {(row.task, row.metric): row.value for row in found.rows}
        assert values["kinds", "acc"] == values["again", "acc"] == right.double().mean().item()
        bias = expected_logits(roberta, [""]).log_softmax(-1)
        informed = (expected_logits(roberta).log_softmax(-1) - bias).argmax(-1)
        right = informed == torch.arange(len(TEXTS)) % len(LABELS)
        assert values["again", "acc_mutual_info"] == right.double().mean().item()


class TestTexts:
    @pytest.mark.parametrize(("kind", "longest"), [("roberta", 18), ("bert", 20), ("llama", 64)])
    def test_longer_than_the_model_reads_are_truncated_and_told_of(
        self, kind: str, longest: int, tmp_path: Path
    ) -> None:
        """RoBERTa's positions begin after the one of padding, which is 1."""
        model = save_classifier(tmp_path / "model", kind)
        texts = [f"{text} {text} {text}" for text in LONG] + TEXTS
        tasks = save_task(tmp_path / "tasks", texts=texts)
        found = ask(model, tasks, output=tmp_path / "out")
        (warning,) = found.warnings
        assert (
            warning
            == f"{model}: 4 of 16 texts are longer than {longest} tokens, and were truncated"
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
        rows = [
            tokenizer(t, truncation=True, max_length=longest, return_tensors="pt") for t in texts
        ]
        with torch.no_grad():
            logits = torch.cat([plain(**row).logits for row in rows])
        answers = answers_of(tmp_path / "out", "model")
        assert_answers(answers, logits)

    def test_are_cut_at_a_lower_maximum(self, roberta: Path, tmp_path: Path) -> None:
        tasks = save_task(tmp_path / "tasks")
        found = ask(roberta, tasks, model_args="max_length=5")
        longer = sum(len(text.split()) + 2 > 5 for text in TEXTS)
        assert f"{longer} of 12 texts are longer than 5 tokens" in found.warnings[0]

    def test_of_digits_are_texts(self, roberta: Path, tmp_path: Path) -> None:
        tasks = save_task(tmp_path / "tasks", texts=["7", "w1", "12"])
        (row,) = ask(roberta, tasks).rows
        assert row.n == 3

    def test_in_pairs(self, roberta: Path, tmp_path: Path) -> None:
        pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7"), ("w8 w9", "w1 w2")]
        tasks = save_task(tmp_path / "tasks", texts=[" ||| ".join(pair) for pair in pairs])
        ask(roberta, tasks, model_args={"pair_separator": " ||| "}, output=tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(roberta)
        model = AutoModelForSequenceClassification.from_pretrained(roberta).eval()
        with torch.no_grad():
            logits = torch.cat([model(**tokenizer(*p, return_tensors="pt")).logits for p in pairs])
        answers = answers_of(tmp_path / "out", "roberta")
        assert_answers(answers, logits)
        with pytest.raises(EvaluationError, match=r"' \|\|\| ' is 0 times in 'w1', expected once"):
            ask(roberta, save_task(tmp_path / "single", texts=["w1"]),
                model_args={"pair_separator": " ||| "})  # fmt: skip


class TestHeads:
    def test_that_fine_tuning_added_are_brought(
        self, encoders: Path, tasks: Path, tmp_path: Path
    ) -> None:
        told: list[str] = []
        roles = {"finetuned": encoders / "direct", "diff": encoders / "diff", "alpha": [0.5, 1]}
        output = tmp_path / "out"
        found = ask(encoders / "target", tasks, **roles, output=output, progress=told.append)
        assert [row.alpha for row in found.rows] == [None, 0.5, 1.0, None]
        assert any("has no classification head: that of" in line for line in told)
        assert found.best is not None
        argv = [*shlex.split(found.best.command)[1:], "--dry-run"]
        assert tiny.run(*argv).status == 0
        for alpha, name in ((0, "target"), (0.5, "target+0.5"), (1, "target+1.0")):
            graft = tmp_path / f"graft{alpha}"
            apply_diff(encoders / "diff", encoders / "target", graft, alpha=alpha, added="bring")
            logits = expected_logits(graft)
            answers = answers_of(output, name)
            assert_answers(answers, logits)
        again = ask(encoders / "target", tasks, **roles, output=output)
        assert len(again.reused) == 4
        assert again.rows == found.rows

    def test_that_are_borrowed_do_not_change_the_name_in_warnings(
        self, encoders: Path, tasks: Path
    ) -> None:
        args = {"diff": encoders / "diff", "model_args": "max_length=5"}
        target = encoders / "target"
        named = [line.split(": ")[0] for line in ask(target, tasks, **args).warnings]
        assert named == [f"{target}", f"{target} + 1.0·Δ"]

    def test_of_the_target_stay_if_fine_tuning_brings_none(
        self, encoders: Path, tasks: Path, tmp_path: Path
    ) -> None:
        ask(encoders / "direct", tasks, diff=encoders / "headless", output=tmp_path / "out")
        apply_diff(encoders / "headless", encoders / "direct", tmp_path / "graft")
        expected = expected_logits(tmp_path / "graft").argmax(-1)
        assert torch.equal(answers_of(tmp_path / "out", "direct+1.0").argmax(-1), expected)

    def test_that_no_model_has_are_missed(self, encoders: Path, tasks: Path) -> None:
        said = r"target: is 'RobertaForMaskedLM', but the .* diffxfer tune"
        with pytest.raises(EvaluationError, match=said):
            ask(encoders / "target", tasks)
        with pytest.raises(EvaluationError, match=r"target: is 'RobertaForMaskedLM', but the"):
            ask(encoders / "target", tasks, diff=encoders / "headless")
        with pytest.raises(EvaluationError, match="--backend hf"):
            ask([encoders / "direct", FAMILY / "target"], tasks)

    def test_are_no_language_models(self, roberta: Path) -> None:
        expected = (
            "is 'RobertaForSequenceClassification', but the backend hf needs a language model;"
            " give --backend classifier"
        )
        with pytest.raises(EvaluationError, match=expected):
            evaluate(roberta, tasks="pig_latin", include_path=FAMILY / "tasks")


class TestLabels:
    @pytest.mark.parametrize(
        ("choices", "labels", "classes"),
        [
            (["b", " a"], ["a", "b "], [1, 0]),
            (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
            (["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
            (["1", "0"], ["0", "1"], [1, 0]),
        ],
    )
    def test_match(self, choices: list[str], labels: list[str], classes: list[int]) -> None:
        assert match_choices(choices, labels, task="t", model="m") == classes

    @pytest.mark.parametrize(
        ("choices", "labels", "told"),
        [
            (["a"], ["a", "b"], "t: has the choices 'a', but the labels of m are 'a', 'b'; use"),
            (
                ["a", "b", "c"],
                ["a", "b"],
                "choices 'a', 'b', 'c', but the labels of m are 'a', 'b'",
            ),
            (["A", "b"], ["a", "b"], "'A', 'b', but the labels of m are 'a', 'b'"),
            (["a", "a"], ["a", "b"], "'a', 'a', but"),
            (["0", "1"], ["a", "b"], "'0', '1', but the labels of m are 'a', 'b'"),
            (["a", "b"], ["LABEL_0", "LABEL_1"], "in id2label .* or use the numbers 0 to 1"),
            (["a", "b"], ["a", "a "], "m: gives two classes the same name in id2label: 'a', 'a'"),
        ],
    )
    def test_do_not_match(self, choices: list[str], labels: list[str], told: str) -> None:
        with pytest.raises(EvaluationError, match=told):
            match_choices(choices, labels, task="t", model="m")

    def test_are_in_the_order_of_the_logits(self) -> None:
        assert labels_in({"id2label": {"10": "c", "2": "b", "0": "a"}}) == ["a", "b", "c"]
        assert labels_in({"num_labels": 3}) == ["LABEL_0", "LABEL_1", "LABEL_2"]
        assert labels_in({}) == ["LABEL_0", "LABEL_1"]

    def test_of_every_model_are_checked_before_the_first_is_scored(
        self, roberta: Path, tasks: Path, tmp_path: Path
    ) -> None:
        other = save_classifier(tmp_path / "other", "roberta")
        config = json.loads((other / "config.json").read_text())
        tiny.write_json(
            other / "config.json", {**config, "id2label": {"0": "x", "1": "y", "2": "z"}}
        )
        told: list[str] = []
        expected = f"kinds: has the choices 'docs', 'code', 'news', but the labels of {other} are"
        with pytest.raises(EvaluationError, match=expected):
            ask([roberta, other], tasks, progress=told.append)
        assert not [line for line in told if line.startswith("scoring")]

    def test_of_every_question_are_checked(self, roberta: Path, tmp_path: Path) -> None:
        tasks = save_task(tmp_path / "tasks")
        rows = [{"text": "w1", "label": 0, "choices": LABELS}]
        rows += [{"text": "w2", "label": 0, "choices": ["docs", "code"]}]
        (tasks / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tasks / "kinds.yaml"
        path.write_text(path.read_text().replace(json.dumps(LABELS), "choices"))
        with pytest.raises(EvaluationError, match="has the choices 'docs', 'code', but"):
            ask(roberta, tasks)


class TestRefusals:
    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (
                {"num_fewshot": 2},
                "--num-fewshot: has no meaning for the backend classifier; omit it",
            ),
            ({"apply_chat_template": True}, "--apply-chat-template: has no"),
            ({"system_instruction": "Be brief."}, "--system-instruction: has no"),
            ({"gen_kwargs": "top_p=1"}, "--gen-kwargs: has no"),
            ({"trust_remote_code": True}, "--trust-remote-code: has no"),
            ({"dtype": "int8"}, "--dtype: 'int8' is unknown"),
            ({"model_args": "parallelize=True"}, "has no argument parallelize; give one of attn_"),
            ({"model_args": "max_length=many"}, "max_length is 'many', expected a number"),
        ],
    )
    def test_of_options(self, roberta: Path, tasks: Path, more: dict[str, Any], told: str) -> None:
        with pytest.raises(OptionError, match=told):
            ask(roberta, tasks, **more)

    def test_of_tasks(self, roberta: Path, tmp_path: Path) -> None:
        tasks = save_task(tmp_path / "tasks", more="num_fewshot: 2")
        with pytest.raises(
            EvaluationError, match=r"puts 2 examples before .* give --num-fewshot 0"
        ):
            ask(roberta, tasks)
        assert ask(roberta, tasks, num_fewshot=0).rows
        expected = (
            "pig_latin: has the output_type generate_until, but the backend classifier answers"
        )
        with pytest.raises(EvaluationError, match=expected):
            ask(roberta, FAMILY / "tasks", tasks="pig_latin")

    def test_of_requests(self, roberta: Path) -> None:
        found = ClassifierLM(roberta, device="cpu")
        asked = [Instance("generate_until", {}, ("w1", {}), 0, ("told", 0, 1))]
        with pytest.raises(EvaluationError, match="told: asks for generated text, but"):
            found.generate_until(asked)
        with pytest.raises(EvaluationError, match="told: asks for the likelihood of texts, but"):
            found.loglikelihood_rolling(asked)
        with pytest.raises(EvaluationError, match="reads a text, and no conversation"):
            found.apply_chat_template([])

    def test_of_batches_that_cannot_be_padded(self, tmp_path: Path) -> None:
        model = save_classifier(tmp_path / "model", "bert")
        path = model / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["pad_token"]
        tiny.write_json(path, config)
        with pytest.raises(EvaluationError, match="no pad token, which batches of 4 need; give"):
            ClassifierLM(model, batch_size=4, device="cpu")
        found = ClassifierLM(model, batch_size="auto", device="cpu")
        assert found.batch_size == 1
        assert found.loglikelihood(requests_of(TEXTS[:2]))

    def test_of_a_head_of_another_size(self, roberta: Path, tmp_path: Path) -> None:
        model = shutil.copytree(roberta, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        config |= {"id2label": {"0": "cold", "1": "hot"}, "label2id": {"cold": 0, "hot": 1}}
        (model / "config.json").write_text(json.dumps(config))
        tasks = save_task(tmp_path / "tasks", choices=["cold", "hot"])
        said = (
            r"model: has tensors whose shape config.json does not give, so another model would"
            r" be loaded: classifier.out_proj.bias, classifier.out_proj.weight; correct that file"
        )
        with pytest.raises(CheckpointError, match=said):
            ask(model, tasks)

    def test_of_a_model_without_a_tokenizer(self, roberta: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(roberta / name, tmp_path)
        with pytest.raises(DiffxferError, match="has no tokenizer"):
            ClassifierLM(tmp_path, device="cpu")


@register_model("as good as none")
class Silent(LM):
    """A backend that gives every choice the same answer."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        return [(0.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        return [0.0 for _ in requests]

    def generate_until(self, requests: Any) -> list[str]:
        return ["" for _ in requests]


def test_scores_are_reused_only_for_the_same_backend(
    roberta: Path, tasks: Path, tmp_path: Path
) -> None:
    first = ask(roberta, tasks, output=tmp_path)
    other = ask(roberta, tasks, output=tmp_path, backend="as good as none")
    again = ask(roberta, tasks, output=tmp_path)
    assert (first.reused, other.reused, again.reused) == ((), (), (str(roberta),))
    assert first.rows == again.rows != other.rows


class TestInLmEval:
    def test_it_is_a_model_under_its_name(self, roberta: Path, tasks: Path) -> None:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = simple_evaluate(
            model="diffxfer-classifier",
            model_args=f"pretrained={roberta},dtype=float32",
            tasks=["kinds"],
            task_manager=manager,
            batch_size=4,
            device="cpu",
        )
        (row,) = ask(roberta, tasks).rows
        assert found["results"]["kinds"]["acc,none"] == row.value

    @pytest.mark.slow  # lm-eval's command reads the index of all tasks
    def test_its_own_command_finds_it(self, roberta: Path, tasks: Path, tmp_path: Path) -> None:
        (code,) = re.findall(r'^python -c "(.*)"', GUIDE.read_text("utf-8"), re.MULTILINE)
        argv = ["--model", "diffxfer-classifier", "--model_args", "pretrained=roberta"]
        argv += ["--tasks", "kinds", "--include_path", str(tasks)]
        argv += ["--batch_size", "4", "--output_path", str(tmp_path), "--log_samples"]
        command = [sys.executable, "-c", code, *argv]
        subprocess.run(command, check=True, capture_output=True, cwd=roberta.parent)
        answers = answers_of(tmp_path, "roberta")
        assert_answers(answers, expected_logits(roberta))


@pytest.mark.parametrize("json_wanted", [True, False])
def test_from_the_command_line(
    roberta: Path, tasks: Path, tmp_path: Path, json_wanted: bool
) -> None:
    argv = ["eval", str(roberta), "--tasks", "kinds", "--include-path", str(tasks)]
    argv += ["--backend", "classifier", "--device", "cpu", "--model-args", "max_length=5"]
    done = tiny.run(*argv, *(["--json"] if json_wanted else ["--quiet"]))
    assert done.status == 0, done
    expected = "of 12 texts are longer than 5 tokens, and were truncated"
    assert done.err.count(expected) == 1
    if json_wanted:
        found = json.loads(done.out)
        assert found["rows"][0]["metric"] == "acc"
        assert expected in found["warnings"][0]
    else:
        assert "acc ↑" in done.out
