"""Loading models and tokenizers for training, with one-line errors.

The module imports torch and transformers; only `recycling.trainer` may import it.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled

from diffxfer.errors import DataError, TrainingError, first_line, listed
from diffxfer.recycling.trained_model import pair_trained_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.training_data import TrainingRows

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
"""The exceptions that transformers raises for invalid configs and files."""


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model, and check that transformers uses exactly its tensors.

    Args:
        checkpoint: the model on disk.
        dtype: the dtype of its parameters in memory.

    Returns:
        The model, on the CPU. Code in the checkpoint is not executed.

    Raises:
        TrainingError: if transformers cannot load it, ignores tensors or initialises new ones.
    """
    folder = checkpoint.folder
    try:
        # The annotation does not cover `output_loading_info`.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except _LOAD_ERRORS as exc:
        problem = f"cannot be loaded by transformers ({first_line(exc)})"
        raise TrainingError(folder, problem, "try a newer version of transformers") from exc
    model: PreTrainedModel = loaded[0]
    for kind, what in (
        ("unexpected_keys", "has tensors that transformers ignores"),
        ("missing_keys", "lacks tensors that transformers expects"),
        ("mismatched_keys", "has tensors whose shape transformers does not expect"),
    ):
        if loaded[1][kind]:
            names = sorted(str(name) for name in loaded[1][kind])
            problem = f"{what}, so a different model would be trained: {listed(names)}"
            raise TrainingError(folder, problem, "save the model with save_pretrained first")
    return model


def check_saved_names(checkpoint: Checkpoint, model: PreTrainedModel, scratch: Path) -> None:
    """Check, before training, that the result can be saved under the names of the model.

    transformers may fuse and rename tensors in memory, so the model is saved to find their names.

    Args:
        checkpoint: the model on disk.
        model: the same model in memory.
        scratch: a temporary folder to save it to.

    Raises:
        TrainingError: if a saved tensor has no counterpart in the checkpoint.
    """
    # With ZeRO-3, a process has only parts of tensors; names are checked after training.
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    pair_trained_tensors(checkpoint, scratch)
    shutil.rmtree(scratch)


def load_tokenizer(folder: Path, rows: TrainingRows) -> Any:
    """Load the tokenizer of a model, and check that it can tokenize the rows.

    Args:
        folder: the folder of the model.
        rows: the training rows.

    Returns:
        The tokenizer.

    Raises:
        TrainingError: if there is no tokenizer, or it lacks what the rows need.
        DataError: if the chat template rejects a row.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _LOAD_ERRORS as exc:
        problem = f"has no tokenizer that transformers can load ({first_line(exc)})"
        raise TrainingError(folder, problem, "add the files of its tokenizer") from exc
    if tokenizer.eos_token is None:
        problem = "has a tokenizer without the end-of-sequence token that ends each row"
        raise TrainingError(folder, problem, "set eos_token in tokenizer_config.json")
    if rows.chat and not tokenizer.chat_template:
        keys = " and ".join(rows.columns)
        problem = f"has no chat template, but the rows of {rows.name} have messages in {keys}"
        remedy = "give rows of text (prompt and completion, or text), or add a chat_template.jinja"
        raise TrainingError(folder, problem, f"{remedy} to the model")
    if rows.chat:
        _try_template(tokenizer, rows)
    return tokenizer


def _try_template(tokenizer: Any, rows: TrainingRows) -> None:
    for number, values in enumerate(zip(*rows.columns.values(), strict=True), 1):
        messages = [message for part in values for message in part]
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as exc:  # a template may raise anything
            problem = f"row {number} is rejected by the model's chat template ({first_line(exc)})"
            raise DataError(rows.name, problem, "correct or remove that row") from exc
