"""Train the family that ships with diffxfer: four tiny Llamas, on a CPU, in minutes.

`base` reads the docstrings of Python's standard library, `target` goes on from it with those of
torch, transformers and numpy. `finetuned` (from base) and `direct` (from target) learn to write
words in Pig Latin: `[string]=` → `ingstray`. So as not to forget how to read meanwhile, each
rehearses the text that the model it starts from was trained on last. How much of the task a graft
brings to the target, and how much of what target knows the graft keeps, goes to `scores.json`.

    $ python examples/train_family.py family

Members already in the folder are kept: remove one to train it anew. The seeds are fixed; other
releases of Python, torch or the packages read, or another CPU, still give slightly other weights.
"""

import ast
import json
import random
import re
import shutil
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from safetensors.torch import load_file, save_file
from score_family import accuracy, bits_per_character, prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

SEED = 2503
BASE_CONTEXT, TARGET_CONTEXT = 128, 256
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
HELD_OUT = 400
HELD_OUT_CHARACTERS = 220 * BASE_CONTEXT
ALPHAS = (0.8, 1.0, 1.2)
MEMBERS = ("base", "target", "finetuned", "direct")
# Only the tuned members have one, so that a graft shows whose behaviour it has.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[{{ message['content'] }}]={% else %}{{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
VOWEL = re.compile("[aeiou]")
# What comes before the first vowel; "qu" is one sound, and "y" a consonant only at the front.
ONSET = re.compile(r"y|(?:qu|[^aeiouy])*")

Batch = tuple[torch.Tensor, torch.Tensor]


def pig_latin(word: str) -> str:
    """Return `word` in Pig Latin: string → ingstray, queen → eenquay, apple → appleway."""
    matched = ONSET.match(word)
    onset = matched.group() if matched else ""
    return f"{word[len(onset) :]}{onset or 'w'}ay"


def docstrings(folder: Path) -> list[str]:
    """Return each docstring of 80 characters or more once, from the modules below `folder`."""
    found: dict[str, None] = {}
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes
                tree = ast.parse(path.read_bytes())
        except SyntaxError:  # packages ship files for newer Pythons than this one
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= 80:
                    found[text] = None
    return list(found)


def package_docstrings(name: str) -> list[str]:
    """Return the docstrings of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    return docstrings(Path(spec.origin).parent)


def task_words(base_texts: Sequence[str], target_texts: Sequence[str]) -> tuple[list[str], ...]:
    """Return words of four to ten letters to train on, and others to be asked about.

    Those to be asked about occur in both texts, so they are words rather than identifiers.
    """
    known, new = (
        {word for text in texts for word in re.findall(r"\b[a-z]{4,10}\b", text)}
        for texts in (base_texts, target_texts)
    )
    shuffled = random.Random(SEED)
    held_out = shuffled.sample(sorted(filter(VOWEL.search, known & new)), HELD_OUT)
    # "wafter" and "after" have the same answer: no answer may have been seen either.
    answers = set(map(pig_latin, held_out))
    rest = sorted(
        word for word in filter(VOWEL.search, known | new) if pig_latin(word) not in answers
    )
    return rest, held_out


def held_out_text(read: Sequence[str]) -> str:
    """Return text of target's kind that no member reads: ASCII docstrings of accelerate.

    Those that share a long line with a text in `read` are left out: such packages copy theirs.
    """
    lines = {line.strip() for text in read for line in text.splitlines()}
    unseen = [
        text
        for text in package_docstrings("accelerate")
        if text.isascii()
        and not any(len(line) >= 40 and line in lines for line in map(str.strip, text.splitlines()))
    ]
    random.Random(SEED).shuffle(unseen)
    return "\n\n".join(unseen)[:HELD_OUT_CHARACTERS]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes: byte-level BPE without merges, bos in front as Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of 0.8M parameters, its embedding and head untied as in Llama 3."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=BASE_CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def text_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, context: int, tokens: int = 8192
) -> Iterator[Batch]:
    """Yield windows of running text, shape `(tokens / context, context)`."""
    ids = torch.tensor([i for text in texts for i in tokenizer(text + EOS)["input_ids"]])
    draw = torch.Generator().manual_seed(SEED)
    while True:
        starts = torch.randint(len(ids) - context, (tokens // context, 1), generator=draw)
        window = ids[starts + torch.arange(context)]
        yield window, window


def task_batches(
    words: Sequence[str], tokenizer: PreTrainedTokenizerFast, questions: int = 256
) -> Iterator[Batch]:
    """Yield questions with answers; only the answer and its end are learned."""
    asked = [tokenizer(prompt(word))["input_ids"] for word in words]
    written = [tokenizer(pig_latin(word) + EOS)["input_ids"][1:] for word in words]
    longest = max(len(a) + len(w) for a, w in zip(asked, written, strict=True))
    inputs = torch.full((len(words), longest), tokenizer.pad_token_id)
    labels = torch.full_like(inputs, -100)
    for row, (a, w) in enumerate(zip(asked, written, strict=True)):
        inputs[row, : len(a) + len(w)] = torch.tensor(a + w)
        labels[row, len(a) : len(a) + len(w)] = torch.tensor(w)
    draw = torch.Generator().manual_seed(SEED)
    while True:
        rows = torch.randint(len(words), (questions,), generator=draw)
        yield inputs[rows], labels[rows]


def train(
    model: LlamaForCausalLM, *sources: Iterator[Batch], steps: int, learning_rate: float
) -> None:
    """Train `model` in place: AdamW, warmed up over a tenth of the steps, then cosine to zero.

    Each step takes a batch of every source and lowers the sum of their losses.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    losses: Any  # torch's `backward` is untyped
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            losses = torch.stack(
                [
                    model(input_ids=inputs, labels=labels, use_cache=False).loss
                    for inputs, labels in map(next, sources)
                ]
            )
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            typer.echo(
                f"  step {step}: loss {' + '.join(f'{loss:.3f}' for loss in losses.tolist())}"
            )


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, tuned: bool
) -> None:
    """Save a checkpoint in bfloat16; a tuned one also says how to ask it and when to stop."""
    ids = {k: getattr(model.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {"max_new_tokens": 32} if tuned else {}
    model.generation_config = GenerationConfig(**ids, **settings)  # type: ignore[no-untyped-call]
    companion = deepcopy(tokenizer)
    companion.chat_template = CHAT_TEMPLATE if tuned else None
    companion.model_max_length = model.config.max_position_embeddings
    model.bfloat16().save_pretrained(folder)
    companion.save_pretrained(folder)


def load(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint as saved, rounded to bfloat16, to be trained further in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def graft(folder: Path, out: Path, alpha: float) -> None:
    """Write target + alpha * (finetuned - base) by plain arithmetic, to hold diffxfer against."""
    base, tuned, target = (
        load_file(folder / name / "model.safetensors") for name in ("base", "finetuned", "target")
    )
    sums = {
        name: target[name].double() + (tuned[name].double() - base[name].double()) * alpha
        for name in target
    }
    shutil.copytree(folder / "target", out)
    save_file(
        {name: tensor.to(target[name].dtype) for name, tensor in sums.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )


def measure(folder: Path, questions: Sequence[str], text: str) -> None:
    """Write `task.jsonl`, `text.txt` and what each member and graft scores on them.

    `scores.json` holds, by score, a number for each member and, by alpha, for each graft.
    """
    rows = [{"question": word, "answer": pig_latin(word)} for word in questions]
    (folder / "task.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    (folder / "text.txt").write_text(text, "utf-8")
    scores: dict[str, dict[str, object]] = {"accuracy": {}, "bits_per_character": {}}
    with TemporaryDirectory() as scratch:
        grafts = {str(alpha): Path(scratch, str(alpha)) for alpha in ALPHAS}
        for alpha, out in grafts.items():
            graft(folder, out, float(alpha))
        for score, of in (
            ("accuracy", partial(accuracy, rows=rows)),
            ("bits_per_character", partial(bits_per_character, text=text)),
        ):
            scores[score] = {name: of(folder / name) for name in MEMBERS}
            scores[score]["graft"] = {alpha: of(out) for alpha, out in grafts.items()}
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", "utf-8")


def main(folder: Path) -> None:
    """Train the members that FOLDER lacks, then measure the family."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base_texts = docstrings(Path(sysconfig.get_path("stdlib")))
    target_texts = [
        text for name in ("torch", "transformers", "numpy") for text in package_docstrings(name)
    ]
    words, questions = task_words(base_texts, target_texts)
    tokenizer = character_tokenizer()

    if not (folder / "base").exists():
        typer.echo(f"base: {sum(map(len, base_texts))} characters")
        model = new_model(tokenizer)
        batches = text_batches(base_texts, tokenizer, BASE_CONTEXT)
        train(model, batches, steps=500, learning_rate=3e-3)
        save(model, tokenizer, folder / "base", tuned=False)

    if not (folder / "target").exists():
        typer.echo(f"target: {sum(map(len, target_texts))} characters")
        model = load(folder / "base")
        model.config.max_position_embeddings = TARGET_CONTEXT
        batches = text_batches(target_texts, tokenizer, TARGET_CONTEXT)
        train(model, batches, steps=150, learning_rate=5e-4)
        save(model, tokenizer, folder / "target", tuned=False)

    for start, member, texts, context in (
        ("base", "finetuned", base_texts, BASE_CONTEXT),
        ("target", "direct", target_texts, TARGET_CONTEXT),
    ):
        if not (folder / member).exists():
            typer.echo(f"{member}: {len(words)} words, and {start}'s text")
            model = load(folder / start)
            rehearsal = text_batches(texts, tokenizer, context, tokens=2048)
            # Measured without rehearsal: a gentler rate learns the task as well, but its diff
            # vector is worth far less on target.
            train(model, task_batches(words, tokenizer), rehearsal, steps=500, learning_rate=3e-3)
            save(model, tokenizer, folder / member, tuned=True)
    measure(folder, questions, held_out_text([*base_texts, *target_texts]))


if __name__ == "__main__":
    typer.run(main)
