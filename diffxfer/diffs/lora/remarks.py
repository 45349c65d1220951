"""What a user should know of an adapter that was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.diffs.artifact.kept import share
from diffxfer.diffs.lora.parts import Form
from diffxfer.errors import MatchError, listed

if TYPE_CHECKING:
    from diffxfer.diffs.lora.names import PeftNames
    from diffxfer.diffs.lora.tensors import AdapterTensors

_LARGE = 0.5
"""The share of an adapter's bytes at which whole tensors are worth a warning."""


def refuse_empty(made: AdapterTensors) -> None:
    """Refuse an adapter without tensors.

    Args:
        made: its tensors.

    Raises:
        MatchError: if finetuned is base, or all that differs is dropped.
    """
    if made.tasks:
        return
    if made.entries:
        raise MatchError(
            (),
            "finetuned differs from base only in tensors that --rest drop leaves out:"
            f" {listed([*made.entries])}",
            "give --rest modules_to_save",
        )
    raise MatchError(
        (),
        "finetuned and base are equal in every tensor, so that the adapter would be empty",
        "check that the first folder is the fine-tuned model",
    )


def warnings_of(made: AdapterTensors, names: PeftNames) -> list[str]:
    """What a user should know."""
    said = []
    if names.unknown:
        said.append(
            "the installed transformers does not know this model, so the adapter has the names on"
            " disk; PEFT skips those that the loaded model has not: check what it says"
        )
    lost = {n: e for n, e in made.entries.items() if e.form == Form.DROPPED.value}
    if lost:
        part = 1 - share(
            {n: e.model_copy(update={"kept": 1.0 - (n in lost)}) for n, e in made.entries.items()}
        )
        said.append(
            f"--rest {made.options.rest} leaves out {part:.2%} of the squared norm of Δ:"
            f" {listed([*lost])}"
        )
    entire = {n: e for n, e in made.entries.items() if e.form == Form.WHOLE.value}
    size, total = (sum(e.bytes for e in group.values()) for group in (entire, made.entries))
    if total and size / total > _LARGE:
        said.append(
            f"tensors stored whole take {gigabytes(size)} of {gigabytes(total)}:"
            f" {listed([*entire])}; --rest lora stores factors, --rest drop nothing of them"
        )
    return said


def notes_of(made: AdapterTensors) -> list[str]:
    """What a user may want to know."""
    said = [
        f"stored whole, since {why}: {listed(names)}" for why, names in made.fallen_back.items()
    ]
    for module, (rows, before) in made.resized.items():
        said.append(
            f"{module} has {rows:,} rows and base {before:,}: before PEFT loads this adapter,"
            f" call model.resize_token_embeddings({rows})"
        )
    forms = {entry.form for entry in made.entries.values()}
    if forms & {Form.WHOLE.value, Form.BIAS.value} or made.stored.whole:
        other = "drop" if made.options.rest == "lora" else "lora"
        said.append(
            f"vLLM loads only adapters without whole tensors and biases: give --rest {other}"
        )
    return said
