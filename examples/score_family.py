"""Score a member of the family: how many held-out words it writes in Pig Latin.

$ python examples/score_family.py out/graft
0.9125
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffxfer.family import family_folder

# Ten letters, "way" and the end: an answer that runs on past this is wrong anyway.
MAX_NEW_TOKENS = 16


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


def main(folder: Path) -> None:
    """Print the accuracy of the checkpoint in FOLDER."""
    typer.echo(accuracy(folder))


if __name__ == "__main__":
    typer.run(main)
