"""The shipped questions and text as data sets, for the lm-eval tasks beside this file.

lm-eval imports it by its path, as it does the helpers of any task: it is in no package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FAMILY = Path(__file__).resolve().parent.parent
# What base was trained with. In longer windows it would lose for its short context, not its text.
_WINDOW = 128


def words(**_: object) -> dict[str, Any]:
    """The held-out words with their Pig Latin, and three choices of which that is one.

    Args:
        **_: the task's metadata, which lm-eval passes.

    Returns:
        A `test` split: `question`, `answer`, and `choices` in alphabetical order, which says
        nothing about the answer.
    """
    lines = (_FAMILY / "task.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return _test_split([{**row, "choices": _choices(**row)} for row in rows])


def text(**_: object) -> dict[str, Any]:
    """The held-out text in windows of 128 characters.

    Args:
        **_: the task's metadata, which lm-eval passes.

    Returns:
        A `test` split: `text`.
    """
    whole = (_FAMILY / "text.txt").read_text("utf-8")
    starts = range(0, len(whole) - _WINDOW + 1, _WINDOW)
    return _test_split([{"text": whole[start : start + _WINDOW]} for start in starts])


def bits_of_text(
    doc: Mapping[str, str], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """What a window counts for in the mean of `bits_per_byte`.

    Args:
        doc: a row of `text`.
        results: of the window's one request: its log-likelihood in nats, and whether it is what
            the model would have written.

    Returns:
        The log-likelihood and the number of bytes, as lm-eval sums them up.
    """
    return {"bits_per_byte": (results[0][0], len(doc["text"].encode()))}


def _choices(question: str, answer: str) -> list[str]:
    """The answer and the first two mistakes that differ from it, all about equally long.

    The mistakes: to treat a consonant as a vowel, to move nothing, to move a vowel.
    """
    mistakes = (f"{question}way", f"{question}ay", f"{question[1:]}{question[0]}ay")
    return sorted([answer, *[mistake for mistake in mistakes if mistake != answer][:2]])


def _test_split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
