"""Score a member of the family, or a graft: how well it knows the task, and how well it reads.

$ python examples/score_family.py "$(python -m diffxfer.family)/target"
0.0% of 400 unseen words right
2.15 bits per character of unseen text
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from diffxfer.family import family_folder

# Ten letters, "way" and the end: an answer that runs on past this is wrong anyway.
MAX_NEW_TOKENS = 16
# What base was trained with. In longer windows it would lose for its short context, not its text.
CONTEXT = 128


def prompt(question: str) -> str:
    """Return a question as the fine-tuned members' chat template puts it, without the bos token."""
    return f"[{question}]="


def held_out() -> list[dict[str, str]]:
    """Return the shipped questions and answers, none of which was trained on."""
    lines = (family_folder() / "task.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def accuracy(folder: Path, rows: Sequence[dict[str, str]] | None = None) -> float:
    """Return the share of questions whose whole greedy answer is right.

    The bfloat16 weights are computed with in float32, on the CPU: the same answers every time.

    Args:
        folder: a checkpoint of the family. Its own chat template is not used, since base and
            target have none: every member is asked in the same words.
        rows: `question` and `answer` each; the shipped held-out ones by default.

    Returns:
        A share between 0 and 1.
    """
    rows = held_out() if rows is None else rows
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer([prompt(row["question"]) for row in rows], padding=True, return_tensors="pt")
    written = model.generate(**asked, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    answers = tokenizer.batch_decode(
        written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True))
    return right / len(rows)


def held_out_text() -> str:
    """Return the shipped text of target's kind, which no member was trained on."""
    return (family_folder() / "text.txt").read_text("utf-8")


def bits_per_character(folder: Path, text: str | None = None) -> float:
    """Return how many bits it takes to tell the next character of running text: fewer is better.

    Windows of 128 characters are read one by one; in each, the first is given and the others are
    predicted. The bfloat16 weights are computed with in float32, on the CPU.

    Args:
        folder: a checkpoint of the family, whose tokens are bytes.
        text: ASCII, so that a character is a token, one window or longer; what is left after the
            last whole window is not read. The shipped held-out text by default.

    Returns:
        Mean bits per predicted character: 8 for one who guesses at random among the 256 bytes.
    """
    text = held_out_text() if text is None else text
    starts = range(0, len(text) - CONTEXT + 1, CONTEXT)
    windows = [text[start : start + CONTEXT] for start in starts]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(windows, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        nats = model(input_ids=ids, labels=ids).loss.item()
    return float(nats / math.log(2))


def main(folder: Path) -> None:
    """Print what the checkpoint in FOLDER scores on the held-out words and text."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    typer.echo(f"{accuracy(folder):.1%} of {len(held_out())} unseen words right")
    typer.echo(f"{bits_per_character(folder):.2f} bits per character of unseen text")


if __name__ == "__main__":
    typer.run(main)
