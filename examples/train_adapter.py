"""Train a LoRA adapter on the shipped family's base with PEFT, graft it on target, and score it.

The adapter learns what `finetuned` learned: to write words in Pig Latin. It is trained as
`train_family.py` trains, with the base's weights frozen. The shipped one was made by

    $ python examples/train_adapter.py diffxfer/family/adapter

A small one learns little if it starts from nothing. It starts from a larger one that knows the
task, which `diffxfer extract --as lora` has cut down to a lower rank or to fewer modules. So the
shipped `small-adapter` was made; `examples/adapters/README.md` has the whole commands:

    $ python examples/train_adapter.py rank-2 --start diffxfer/family/adapter --rank 2 --noise 0.1

With `--noise`, other noise is added to base's weights at every step. The adapter learns to work on
weights near base's, as target's are, without having seen target.

With the folder of an adapter that exists, nothing is trained: it is grafted and scored.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from score_family import accuracy, bits_per_character, held_out
from train_family import (
    BASE_CONTEXT,
    SEED,
    Batch,
    character_tokenizer,
    docstrings,
    load,
    package_docstrings,
    task_batches,
    task_words,
    text_batches,
    train,
)
from transformers.utils import logging

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.family import family_folder


def new_adapter(rank: int) -> Any:
    """Return base with an untrained adapter of all linear layers."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(load(family_folder() / "base"), config)


def smaller_adapter(start: Path, rank: int, modules: str) -> Any:
    """Return base with what is left of an adapter at a lower rank, to be trained further."""
    base = family_folder() / "base"
    with TemporaryDirectory() as scratch:
        small = Path(scratch) / "small"
        extract_diff(start, base, small, as_="lora", rank=rank, include=[modules])
        return PeftModel.from_pretrained(load(base), small, is_trainable=True)


def with_noise(model: Any, batches: Iterator[Batch], noise: float) -> Iterator[Batch]:
    """Yield the batches; before each, add new noise to the frozen matrices of the model.

    Args:
        model: base and an adapter.
        batches: the batches.
        noise: the standard deviation as a share of each matrix's own.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    originals = [parameter.detach().clone() for parameter in frozen]
    for batch in batches:
        for parameter, original in zip(frozen, originals, strict=True):
            drawn = torch.randn_like(original) * original.std()
            parameter.data.copy_(original + drawn * noise)
        yield batch


def train_adapter(
    model: Any,
    out: Path,
    batch: tuple[int, int],
    steps: int,
    learning_rate: float,
    noise: float,
) -> None:
    """Train the adapter of a model on batches of questions and tokens; save it in bfloat16."""
    base_texts = docstrings(Path(sysconfig.get_path("stdlib")))
    target_texts = [
        text for name in ("torch", "transformers", "numpy") for text in package_docstrings(name)
    ]
    words, _ = task_words(base_texts, target_texts)
    tokenizer = character_tokenizer()
    questions = task_batches(words, tokenizer, batch[0])
    if noise:
        questions = with_noise(model, questions, noise)
    rehearsal = text_batches(base_texts, tokenizer, BASE_CONTEXT, tokens=batch[1])
    train(model, questions, rehearsal, steps=steps, learning_rate=learning_rate)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.bfloat16().save_pretrained(out)
    (out / "README.md").unlink()  # PEFT's card is a form that nobody has filled in


def compare(adapter: Path, scratch: Path) -> Table:
    """Graft the adapter and the full fine-tune on target; return what they score, as a table."""
    family = family_folder()
    merged, graft, full = (scratch / name for name in ("merged", "graft", "full"))
    apply_diff(adapter, family / "base", merged)
    apply_diff(adapter, family / "target", graft)
    transfer(family / "finetuned", family / "base", family / "target", full)
    table = Table(caption="Fewer bits per character: it reads text of target's kind better.")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column(f"right of {len(held_out())}\nunseen words", justify="right")
    table.add_column("bits per\ncharacter", justify="right")
    for name, folder in (
        ("base + adapter", merged),
        ("finetuned (all weights)", family / "finetuned"),
        ("target", family / "target"),
        ("target + adapter", graft),
        ("target + (finetuned − base)", full),
    ):
        table.add_row(name, f"{accuracy(folder):.1%}", f"{bits_per_character(folder):.2f}")
    return table


def main(
    out: Annotated[Path, typer.Argument(help="the adapter's folder")],
    start: Annotated[Path | None, typer.Option(help="the adapter to make a smaller one of")] = None,
    modules: Annotated[str, typer.Option(help="which modules of --start, as a regex")] = ".",
    rank: int = 8,
    questions: Annotated[int, typer.Option(help="in a batch")] = 256,
    text: Annotated[int, typer.Option(help="tokens of base's text in a batch")] = 2048,
    steps: int = 500,
    learning_rate: float = 1e-2,
    noise: Annotated[float, typer.Option(help="of base's weights, as a share of them")] = 0.0,
) -> None:
    """Train an adapter into OUT unless it exists, then graft and score it."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not out.exists():
        torch.manual_seed(SEED)
        model = new_adapter(rank) if start is None else smaller_adapter(start, rank, modules)
        train_adapter(model, out, (questions, text), steps, learning_rate, noise)
    with TemporaryDirectory() as scratch:
        Console().print(compare(out, Path(scratch)))


if __name__ == "__main__":
    typer.run(main)
