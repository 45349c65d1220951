"""The bases of the chain: a tiny Llama that reads text, saved four times on the way."""

import random
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import typer
from train_family import BASE_CONTEXT, character_tokenizer, save
from transformers import LlamaConfig, LlamaForCausalLM

WINDOWS_A_STEP = 32
LEARNING_RATE = 3e-3


def new_llama(words: int) -> LlamaForCausalLM:
    """Return an untrained Llama of 0.4M parameters; its tokens are bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=BASE_CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def read_on(model: Any, ids: torch.Tensor, steps: int, draw: torch.Generator) -> None:
    """Train on windows of running text: AdamW, warmed up, and then down to nothing by a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        starts = torch.randint(len(ids) - BASE_CONTEXT, (WINDOWS_A_STEP, 1), generator=draw)
        window = ids[starts + torch.arange(BASE_CONTEXT)]
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            typer.echo(f"  step {step}: loss {loss.item():.3f}", err=True)


def make_bases(folder: Path, stages: Sequence[int], texts: Sequence[str]) -> None:
    """Train the bases `m1`, `m2` and so on; nothing is done where they are.

    Args:
        folder: where they go.
        stages: by how many steps of pretraining each is older than the one before.
        texts: what they read.
    """
    if folder.exists():
        return
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Then sums come in the same order on every number of cores.
    torch.set_num_threads(1)
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    tokenizer = character_tokenizer()
    ends = tokenizer.eos_token_id
    ids = torch.tensor([i for text in shuffled for i in [*tokenizer(text)["input_ids"], ends]])
    model, draw = new_llama(len(tokenizer)), torch.Generator().manual_seed(1)
    for number, steps in enumerate(stages, 1):
        characters = WINDOWS_A_STEP * BASE_CONTEXT
        typer.echo(f"m{number}: {steps} more steps of {characters} characters", err=True)
        read_on(model, ids, steps, draw)
        # Rounded to bfloat16, as checkpoints are; reading goes on in float32.
        save(deepcopy(model), tokenizer, unfinished / f"m{number}", tuned=False)
    unfinished.rename(folder)
