"""Tiny encoders with a word-level tokenizer, and rows for them."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from diffxfer import tune

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffxfer import TuneReport

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = (*SPECIALS, *(f"w{number}" for number in range(45)))
LABELS = ("cold", "hot", "mild")
RATE = 5e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between ``<s>`` and ``</s>``, with two ``</s>`` between the texts of a pair."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    named = ("bos", "pad", "eos", "unk", "mask")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{n}_token": t for n, t in zip(named, SPECIALS, strict=True)},
    )


def roberta(**changes: Any) -> RobertaConfig:
    """Two layers; dropout is off, unless a test changes it."""
    known: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 34,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return RobertaConfig(**(known | changes))


def save(kind: str, folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A tiny encoder: ``"masked"``, ``"bare"``, ``"classifier"`` or ``"bert"``."""
    torch.manual_seed(seed)
    if kind == "classifier":
        names = dict(enumerate(LABELS))
        changes = {"id2label": names, "label2id": {n: i for i, n in names.items()}} | changes
    config = roberta(**changes)
    model: Any
    if kind == "bert":
        settings = {**config.to_dict(), "type_vocab_size": 2, "pad_token_id": 1}
        settings.pop("model_type")
        model = BertForMaskedLM(BertConfig(**settings))
    else:
        makers: dict[str, Any] = {
            "masked": RobertaForMaskedLM,
            "bare": RobertaModel,
            "classifier": RobertaForSequenceClassification,
        }
        model = makers[kind](config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 9 words."""
    chosen = random.Random(seed)
    return [
        " ".join(chosen.choices(WORDS[len(SPECIALS) :], k=chosen.randint(3, 9)))
        for _ in range(count)
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def labelled(path: Path, count: int = 16, *, pairs: bool = False, numbers: bool = False) -> Path:
    """Rows whose label depends on the first word."""
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts(count)):
        label = int(text.split()[0][1:]) % len(LABELS)
        rows.append({"text": text, "label": label if numbers else LABELS[label]})
        if pairs:
            rows[-1]["text_pair"] = texts(count, 1)[number]
    assert len({row["label"] for row in rows}) == len(LABELS)
    return write(path, rows)


def plain(path: Path, count: int = 16) -> Path:
    """Rows of text."""
    return write(path, [{"text": text} for text in texts(count)])


def tune_shortly(model: Path, data: Path, out: Path, **options: Any) -> TuneReport:
    """A run of few steps on the CPU."""
    known = {"steps": 4, "batch_size": 8, "learning_rate": RATE, "device": "cpu", "warmup": 0}
    return tune(model, data, out, **{**known, **options})
