"""Training and grading of tiny models: running text, and rows of a task."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from families import CONTEXT, Characters, Pieces
from tasks import Row

WINDOWS, ROWS = 16, 64
Batch = tuple[torch.Tensor, torch.Tensor]


def text_ids(texts: Sequence[str], tokenizer: Characters | Pieces, characters: int) -> torch.Tensor:
    """Return the ids of some `characters` of the texts, in an order of their own."""
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    return torch.tensor(tokenizer.encode("\n\n".join(shuffled)[:characters]))


def echoes(words: Sequence[str], characters: int) -> str:
    """Return words and numbers, each written three times: what is learned from it is to copy."""
    draw = random.Random(0)
    parts: list[str] = []
    while sum(map(len, parts[-1:])) + 20 * len(parts) < characters:
        each = draw.choice(words) if draw.random() < 0.6 else str(draw.randrange(1000, 10**6))
        parts.append(f"[{each}]={each}. {each}, ")
    return "".join(parts)


def windows(sources: Sequence[torch.Tensor], seed: int) -> Iterator[Batch]:
    """Yield windows of running text, from each source in turn."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for ids in sources:
            starts = torch.randint(len(ids) - CONTEXT, (WINDOWS, 1), generator=draw)
            window = ids[starts + torch.arange(CONTEXT)]
            yield window, window


def padded(rows: Sequence[Row], tokenizer: Characters | Pieces) -> Batch:
    """Return ids and labels of rows: only the tokens of the answer have a label."""
    asked = [tokenizer.encode(question) for question, _ in rows]
    written = [tokenizer.encode(answer) for _, answer in rows]
    longest = max(len(a) + len(w) for a, w in zip(asked, written, strict=True))
    inputs = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for row, (a, w) in enumerate(zip(asked, written, strict=True)):
        inputs[row, : len(a) + len(w)] = torch.tensor(a + w)
        labels[row, len(a) : len(a) + len(w)] = torch.tensor(w)
    return inputs, labels


def task_batches(rows: Batch, seed: int) -> Iterator[Batch]:
    """Yield rows of a task, drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        some = torch.randint(len(rows[0]), (ROWS,), generator=draw)
        yield rows[0][some], rows[1][some]


def train(
    model: Any,
    batches: Iterator[Batch],
    *,
    steps: int,
    rate: float,
    tell: Callable[[str], None] | None = None,
) -> float:
    """Train in place: AdamW, warmed up over a tenth of the steps, then by a cosine to nothing.

    Returns:
        The loss of the last batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    loss = torch.zeros(())
    for step in range(steps):
        inputs, labels = next(batches)
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if tell and step % 200 == 0:
            tell(f"    step {step}: loss {loss.item():.3f}")
    model.eval()
    return float(loss.item())


def score(model: Any, rows: Batch) -> float:
    """Return the share of rows, in %, whose whole answer is the model's most likely one.

    All tokens are predicted at once from the right answer before them. All of them are right
    exactly when greedy generation writes the right answer, since it then meets the same tokens.
    """
    inputs, labels = rows
    with torch.inference_mode():
        likeliest = model(input_ids=inputs, use_cache=False).logits[:, :-1].argmax(-1)
    right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)
    return float(right.all(1).double().mean()) * 100
