"""Models and tokenizers in memory, with what is wrong with them in one line.

Imports torch and transformers: only `recycling.trainer` imports it.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled

from diffxfer.diffs.report import listed
from diffxfer.errors import DataError, TrainingError, first_line
from diffxfer.recycling.trained_model import pair_trained_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.training_data import TrainingRows

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
"""What transformers raises at configs and files that it cannot make a model from."""


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model, every tensor of it.

    Args:
        checkpoint: the model on disk.
        dtype: of its parameters in memory.

    Returns:
        The model, on the CPU; no code of the checkpoint is run.

    Raises:
        TrainingError: if transformers cannot, or would leave tensors out or make some up.
    """
    folder = checkpoint.folder
    try:
        # Its annotation does not know what comes with `output_loading_info`.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except _LOAD_ERRORS as exc:
        problem = f"cannot be loaded by transformers ({first_line(exc)})"
        raise TrainingError(folder, problem, "see whether a newer transformers can") from exc
    model: PreTrainedModel = loaded[0]
    for kind, what in (
        ("unexpected_keys", "has tensors that transformers does not load"),
        ("missing_keys", "lacks tensors that transformers looks for"),
        ("mismatched_keys", "has tensors of another shape than transformers expects"),
    ):
        if loaded[1][kind]:
            names = sorted(str(name) for name in loaded[1][kind])
            problem = f"{what}, so what was trained would be another model: {listed(names)}"
            raise TrainingError(folder, problem, "save the model with save_pretrained first")
    return model


def check_saved_names(checkpoint: Checkpoint, model: PreTrainedModel, scratch: Path) -> None:
    """Make sure, before anything is trained, that the result can be saved as the model was.

    The names on disk are known only by saving: transformers fuses and renames tensors in memory.

    Args:
        checkpoint: the model on disk.
        model: the same in memory.
        scratch: a folder to save it to; it is removed again.

    Raises:
        TrainingError: if a tensor would have no place.
    """
    # A process has parts of tensors only then; they are checked at the end.
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    pair_trained_tensors(checkpoint, scratch)
    shutil.rmtree(scratch)


def load_tokenizer(folder: Path, rows: TrainingRows) -> Any:
    """Load a tokenizer that can make tokens of these rows.

    Args:
        folder: the model's.
        rows: what it is to be used on.

    Returns:
        The tokenizer.

    Raises:
        TrainingError: if there is none, or it lacks what the rows need.
        DataError: if the chat template refuses a row.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _LOAD_ERRORS as exc:
        problem = f"has no tokenizer that transformers can load ({first_line(exc)})"
        raise TrainingError(folder, problem, "put its tokenizer's files beside it") from exc
    if tokenizer.eos_token is None:
        problem = "has a tokenizer without an end-of-sequence token, which rows end with"
        raise TrainingError(folder, problem, "name its eos_token in tokenizer_config.json")
    if rows.chat and not tokenizer.chat_template:
        keys = " and ".join(rows.columns)
        problem = f"has no chat template, and the rows of {rows.name} have messages in {keys}"
        remedy = "give rows of text (prompt and completion, or text), or put a chat_template.jinja"
        raise TrainingError(folder, problem, f"{remedy} beside the model")
    if rows.chat:
        _try_template(tokenizer, rows)
    return tokenizer


def _try_template(tokenizer: Any, rows: TrainingRows) -> None:
    for number, values in enumerate(zip(*rows.columns.values(), strict=True), 1):
        messages = [message for part in values for message in part]
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as exc:  # a template raises what it likes
            problem = f"row {number} is refused by the model's chat template ({first_line(exc)})"
            raise DataError(rows.name, problem, "mend that row, or leave it out") from exc
