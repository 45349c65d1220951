"""Helpers for tests of training: rows of the shipped family's task, and short runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from diffxfer import tune
from diffxfer.family import family_folder

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer import TuneReport

FAMILY = family_folder()
RATE = 1e-3


def pig_latin(word: str) -> str:
    """A word approximately as the fine-tuned members of the family write it."""
    onset = re.match("(?:qu|[^aeiouy])*", word)
    assert onset is not None
    return f"{word[onset.end() :]}{onset.group() or 'w'}ay"


def write_rows(path: Path, count: int = 32) -> Path:
    """Questions and answers of the family's task, made from words of its text."""
    words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", (FAMILY / "text.txt").read_text())))[:count]
    assert len(words) == count
    rows = [{"prompt": f"[{word}]=", "completion": pig_latin(word)} for word in words]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def tune_shortly(model: Path, data: Path, out: Path, **options: Any) -> TuneReport:
    """A run of few steps on the CPU."""
    known = {"steps": 4, "batch_size": 8, "learning_rate": RATE, "device": "cpu"}
    return tune(model, data, out, **{**known, **options})
