"""Train a model further with plain transformers: a `train.command` for `diffxfer iterate`.

It reads rows of `prompt` and `completion`, learns the completions, and leaves a checkpoint with all
that the one it began with has. Put your own trainer in its place.

$ python examples/train_command.py --model graft --output tuned --data examples/words.jsonl
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

LEARNING_RATE = 1e-3
BATCH = 32


def read_rows(data: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each prompt, and those of its completion with the end."""
    rows = map(json.loads, data.read_text("utf-8").splitlines())
    return [
        (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)[
                "input_ids"
            ],
        )
        for row in rows
    ]


def batch(rows: list[tuple[list[int], list[int]]], padding: int) -> dict[str, torch.Tensor]:
    """Return rows as tensors of one length, shape `(rows, longest)`; only completions count."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    inputs = torch.full((len(rows), longest), padding)
    labels = torch.full_like(inputs, -100)
    mask = torch.zeros_like(inputs)
    for place, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        inputs[place, :end] = torch.tensor(prompt + completion)
        labels[place, len(prompt) : end] = torch.tensor(completion)
        mask[place, :end] = 1
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def train(model: Any, rows: list[tuple[list[int], list[int]]], padding: int, steps: int) -> None:
    """Train `model` in place with AdamW, its rate falling to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(rows), (BATCH,), generator=draw).tolist()
        loss = model(**batch([rows[i] for i in chosen], padding)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        typer.echo(f"step {step}: loss {loss.item():.4f}")


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint to begin with.")],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    data: Annotated[Path, typer.Option(help="Rows of prompt and completion, a .jsonl file.")],
    steps: Annotated[int, typer.Option(min=1, help="How many times the optimizer steps.")] = 20,
    round_number: Annotated[int, typer.Option("--round", help="The round, for the log.")] = 1,
) -> None:
    """Train the checkpoint MODEL on the rows in DATA, and save it at OUTPUT."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    typer.echo(f"round {round_number}: {model}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    trained: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train(trained, read_rows(data, tokenizer), padding, steps)
    trained.bfloat16().save_pretrained(output)
    # The tokenizer and the chat template as they were, byte for byte.
    for companion in model.iterdir():
        kept = companion.suffix in (".json", ".jinja", ".model") and "index" not in companion.name
        if kept and companion.name != "diffxfer.json" and not (output / companion.name).exists():
            shutil.copy(companion, output)


if __name__ == "__main__":
    typer.run(main)
