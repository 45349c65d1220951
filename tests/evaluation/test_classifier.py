"""The backend for classifiers: transformers' own answers, and grafts as an independent sum."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
)

from diffxfer import Evaluation, apply_diff, evaluate, extract_diff
from diffxfer.errors import DiffxferError, EvaluationError, OptionError
from diffxfer.evaluation.classifier import ClassifierLM
from diffxfer.evaluation.head_labels import labels_in, match_choices
from tests import families, tiny
from tests.evaluation.conftest import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    families.save_model(folder, CONFIGS[kind], seed, dtype=torch.float32, model_class=auto)
    tokenizer = families.fast_tokenizer(["<pad>", "<s>", "</s>"])
    if kind != "llama":
        pair = "<s> $A </s> </s> $B </s>"
        tokens = [("<s>", 31), ("</s>", 32)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair=pair, special_tokens=tokens
        )
    return families.save_tokenizer(folder, tokenizer, pad_token="<pad>")


def ask(models: Any, tasks: Path, **more: Any) -> Evaluation:
    settings = {"tasks": "kinds", "include_path": tasks, "backend": "classifier", "device": "cpu"}
    return evaluate(models, **{**settings, "batch_size": 4, **more})


def samples_of(output: Path, model: str) -> list[dict[str, Any]]:
    (path,) = (output / model).glob("samples_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda sample: int(sample["doc_id"]))


def answers_of(output: Path, model: str) -> torch.Tensor:
    """The answers that lm-eval recorded: `(row, class)`, in the order of the choices."""
    rows = [sample["filtered_resps"] for sample in samples_of(output, model)]
    return torch.tensor([[float(value) for value, _ in row] for row in rows], dtype=torch.float64)


def expected_logits(folder: Path, texts: list[str] = TEXTS) -> torch.Tensor:
    """transformers' own logits, text by text, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in texts])


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


class TestAnswers:
    def test_are_those_of_transformers(self, family: Path, tasks: Path, tmp_path: Path) -> None:
        found = ask(family / "target", tasks, output=tmp_path / "out")
        answers = answers_of(tmp_path / "out", "target")
        logits = expected_logits(family / "target")
        torch.testing.assert_close(answers, logits.double().log_softmax(-1), rtol=0, atol=1e-6)
        assert torch.equal(answers.argmax(-1), logits.argmax(-1))
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
        torch.testing.assert_close(answers, logits.double().log_softmax(-1), rtol=0, atol=1e-6)
        assert torch.equal(answers.argmax(-1), logits.argmax(-1))
        assert not torch.allclose(answers, answers_of(tmp_path / "o", "target"), atol=1e-3)
