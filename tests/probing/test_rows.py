"""Rows are tokenized and masked as TRL's SFTTrainer does with the settings of `tune`."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diffxfer.errors import DataError
from diffxfer.family import family_folder
from diffxfer.probing.row_data import ROWS, borrow_template, model_kind, read_probe_rows
from diffxfer.probing.rows import TokenRow, causal_rows
from tests.families import fast_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

FAMILY = family_folder()
CAUSAL = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128}
MASKED = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "max_position_embeddings": 21,
    "pad_token_id": 0,
}
CLASSIFIER = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "id2label": {"0": "bad", "1": "good"},
}
MESSAGES = [{"role": "user", "content": "wisdom"}, {"role": "assistant", "content": "isdomway"}]
FORMS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "a plain text"}, {"text": "ended<|eos|>"}, {"text": "é"}],
    "completion": [
        {"prompt": "[wisdom]=", "completion": "isdomway"},
        {"prompt": "", "completion": "x"},
        {"prompt": "[a]=", "completion": "away<|eos|>"},
    ],
    # The last word of the prompt and the first of the completion are one token together.
    "merged completion": [{"prompt": "w1 w", "completion": "2 w3"}],
    "chat completion": [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}],
    "messages": [{"messages": MESSAGES}, {"messages": MESSAGES * 2}],
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def family_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FAMILY / "finetuned")


def encoder_tokenizer(**options: Any) -> Any:
    """Words with [CLS] before and [SEP] after each text; pairs have segments."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = fast_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **options})


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + place) % 30}" for place in range(count))


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_masks_are_those_that_tune_trains_on(form: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM

    from diffxfer.recycling.trainer_config import make_trainer_config, silence_libraries
    from diffxfer.recycling.training_data import read_rows
    from diffxfer.recycling.training_options import TuneOptions

    tokenizer = family_tokenizer()
    if form == "merged completion":
        words = fast_tokenizer(["</s>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    data = write(tmp_path / "a.jsonl", FORMS[form])
    read = read_rows(data)
    names = ("steps", "batch_size", "gradient_accumulation", "max_length", "seed")
    options: dict[str, Any] = dict.fromkeys(names, 1)
    options |= {"learning_rate": 1e-5, "gradient_checkpointing": False, "save_every": None}
    options |= {"objective": "causal", "warmup": 0.0, "end_token": True}
    options |= {"distill_weight": 0.5, "temperature": 1.0, "hidden_weight": 0.0}
    with silence_libraries():
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(FAMILY / "finetuned"),
            args=make_trainer_config(TuneOptions(**options), tmp_path / "out", "cpu"),
            train_dataset=datasets.Dataset.from_dict(read.columns),
            processing_class=tokenizer,
        )
    theirs = [
        # No token precedes the first one, so it is never predicted.
        (tuple(row["input_ids"]), (False, *(label != -100 for label in row["labels"][1:])))
        for row in trainer.train_dataset
    ]
    ours = read_probe_rows(data, [CAUSAL]).tokenize(tokenizer)
    if form == "merged completion":
        assert ours == (TokenRow((1, 2, 3, 30), (False, True, True, True)),)
    assert [(row.ids, row.scored) for row in ours] == theirs
    assert all(any(row.scored) for row in ours)


def test_the_prompt_is_what_precedes_the_completion() -> None:
    tokenizer = family_tokenizer()
    columns = {"prompt": ["[wisdom]="], "completion": ["isdomway"]}
    (row,) = causal_rows(columns, tokenizer, max_length=128)
    assert tokenizer.decode(row.prompt) == "<|bos|>[wisdom]="
    assert tokenizer.decode(row.ids) == "<|bos|>[wisdom]=isdomway<|eos|>"
    assert TokenRow((1, 2), (False, False), label=0).prompt == (1, 2)


def test_a_long_text_is_cut_into_windows_that_score_each_token_once() -> None:
    tokenizer = family_tokenizer()
    (whole,) = causal_rows({"text": ["abcdefghij" * 5]}, tokenizer, max_length=500)
    parts = list(causal_rows({"text": ["abcdefghij" * 5]}, tokenizer, max_length=8))
    assert all(2 <= len(row.ids) <= 8 for row in parts)
    scored = [i for row in parts for i, due in zip(row.ids, row.scored, strict=True) if due]
    assert scored == list(whole.ids[1:])
    assert all(one.ids[-1] == other.ids[0] for one, other in pairwise(parts))


def test_a_completion_beyond_the_length_is_truncated_or_dropped_as_by_tune(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abc", "completion": "defghij"},
        {"prompt": "a much longer prompt", "completion": "x"},
    ]
    read = read_probe_rows(write(tmp_path / "a.jsonl", rows), [CAUSAL], max_length=8)
    (row,) = read.tokenize(family_tokenizer())
    assert family_tokenizer().decode(row.ids) == "<|bos|>abcdefg"
    assert sum(row.scored) == 4
    nothing = read_probe_rows(write(tmp_path / "b.jsonl", rows[1:]), [CAUSAL], max_length=8)
    with pytest.raises(DataError, match="no row has a token to predict within 8 tokens"):
        nothing.tokenize(family_tokenizer())


def test_the_shortest_context_of_the_models_limits_the_rows(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "x" * 300}])
    read = read_probe_rows(data, [CAUSAL, {**CAUSAL, "max_position_embeddings": 64}])
    assert max(len(row.ids) for row in read.tokenize(family_tokenizer())) == 64


def test_a_seed_draws_the_rows(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(300)]
    data = write(tmp_path / "a.jsonl", rows)
    one, again = (read_probe_rows(data, [CAUSAL]) for _ in range(2))
    other = read_probe_rows(data, [CAUSAL], seed=1)
    drawn = one.columns["text"]
    assert len(drawn) == len(set(drawn)) == ROWS
    assert one.total == 300
    assert drawn == again.columns["text"] != other.columns["text"]
    assert drawn == sorted(drawn, key=lambda text: int(text[4:]))
    # Windows of long texts are limited too.
    long = write(tmp_path / "b.jsonl", [{"text": "abcdefgh" * 200}])
    read = read_probe_rows(long, [CAUSAL], max_length=5, limit=7)
    assert len(read.tokenize(family_tokenizer())) == 7


def test_messages_of_a_model_without_a_template_take_that_of_another(tmp_path: Path) -> None:
    read = read_probe_rows(write(tmp_path / "a.jsonl", FORMS["messages"]), [CAUSAL])
    base = AutoTokenizer.from_pretrained(FAMILY / "base")
    with pytest.raises(DataError, match="no model has a chat template"):
        borrow_template(read, [base])
    borrow_template(read, [base, family_tokenizer()])
    assert read.tokenize(base) == read.tokenize(family_tokenizer())


class TestMaskedLanguageModels:
    def rows(self, tmp_path: Path, seed: int = 0) -> tuple[TokenRow, ...]:
        texts = [words(count, start) for start, count in enumerate((18, 1, 50))]
        data = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        return read_probe_rows(data, [MASKED], seed=seed).tokenize(encoder_tokenizer())

    def test_fifteen_percent_of_the_words_are_masked(self, tmp_path: Path) -> None:
        tokenizer = encoder_tokenizer()
        rows = self.rows(tmp_path)
        # 20 positions: one is kept free for RoBERTa's; two are special tokens.
        assert [len(row.ids) for row in rows] == [20, 3, 20, 20, 16]
        assert [sum(row.scored) for row in rows] == [3, 1, 3, 3, 2]
        for row in rows:
            assert row.targets is not None
            assert (row.targets[0], row.targets[-1]) == (31, 32)
            for given, due, scored in zip(row.ids, row.targets, row.scored, strict=True):
                assert given == (tokenizer.mask_token_id if scored else due)
                assert not scored or due < 30
        text = [i for row in rows[2:] for i in (row.targets or ())[1:-1]]
        assert tokenizer.decode(text) == words(50, 2)

    def test_the_seed_and_the_row_decide(self, tmp_path: Path) -> None:
        assert self.rows(tmp_path) == self.rows(tmp_path) != self.rows(tmp_path, seed=1)
        assert len({row.scored for row in self.rows(tmp_path) if len(row.ids) == 20}) == 3

    def test_what_they_cannot_use_is_refused(self, tmp_path: Path) -> None:
        data = write(tmp_path / "a.jsonl", FORMS["completion"])
        with pytest.raises(DataError, match="the models predict masked tokens"):
            read_probe_rows(data, [MASKED])
        read = read_probe_rows(write(tmp_path / "b.jsonl", FORMS["text"]), [MASKED])
        with pytest.raises(DataError, match="tokenizer has no mask_token"):
            read.tokenize(family_tokenizer())


class TestClassifiers:
    def test_labels_are_names_or_numbers(self, tmp_path: Path) -> None:
        rows = [{"text": "w1 w2", "label": "good"}, {"text": "w3", "label": 0}]
        read = read_probe_rows(write(tmp_path / "a.jsonl", rows), [CLASSIFIER])
        found = read.tokenize(encoder_tokenizer())
        assert [(row.ids, row.label) for row in found] == [((31, 1, 2, 32), 1), ((31, 3, 32), 0)]
        assert not any(any(row.scored) for row in found)

    def test_pairs_have_segments_and_are_truncated(self, tmp_path: Path) -> None:
        row = {"text": words(9), "text_pair": words(3, 20), "label": 1}
        read = read_probe_rows(write(tmp_path / "a.jsonl", [row]), [CLASSIFIER], max_length=9)
        (found,) = read.tokenize(encoder_tokenizer())
        assert found.ids == (31, 0, 1, 2, 32, 20, 21, 22, 32)
        assert found.types == (0, 0, 0, 0, 0, 1, 1, 1, 1)

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({"text": "w1", "label": "fine"}, "line 1 has the label 'fine', but the model has"),
            ({"text": "w1", "label": 2}, "line 1 has the label 2, but"),
            ({"text": "w1", "label": True}, "line 1 has the label True, but"),
            ({"text": 3, "label": 1}, "line 1 has 3 for 'text', expected text"),
            ({"text": "w1"}, "expected text and a label"),
        ],
    )
    def test_other_rows_are_refused(self, row: Any, problem: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=problem):
            read_probe_rows(write(tmp_path / "a.jsonl", [row]), [CLASSIFIER])


def test_the_architecture_says_what_a_model_predicts() -> None:
    assert [model_kind(config) for config in (CAUSAL, MASKED, CLASSIFIER, {})] == [
        *("causal", "masked", "classifier", "causal")
    ]
