"""Loading models and tokenizers for training, with one-line errors.

The module imports torch and transformers; only `recycling.trainer` may import it.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from diffxfer.diffs.matching.names import is_head_name
from diffxfer.errors import DataError, TrainingError, first_line, listed
from diffxfer.recycling.objectives import model_kind
from diffxfer.recycling.trained_model import is_unused, pair_trained_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.labels import Labels
    from diffxfer.recycling.training_data import TrainingRows

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
"""The exceptions that transformers raises for invalid configs and files."""


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model, and check that transformers uses exactly its tensors.

    Args:
        checkpoint: the model on disk.
        dtype: the dtype of its parameters in memory.

    Returns:
        The model, on the CPU. Code in the checkpoint is not executed.

    Raises:
        TrainingError: if transformers cannot load it, ignores tensors or initialises new ones.
    """
    kind = checkpoint.config.get("model_type")
    if model_kind(checkpoint.config) == "bare" and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        problem = "is a bare encoder, which has no head that predicts tokens"
        remedy = "give rows with text and label, or the masked language model that it is a part of"
        raise TrainingError(checkpoint.folder, problem, remedy)
    model, info = _load(AutoModelForCausalLM, checkpoint, dtype=dtype)
    _refuse_other_tensors(checkpoint, info)
    return model


def load_encoder(
    checkpoint: Checkpoint, dtype: torch.dtype, labels: Labels | None, seed: int
) -> PreTrainedModel:
    """Load a classifier or a masked language model.

    Args:
        checkpoint: the model on disk.
        dtype: the dtype of its parameters in memory.
        labels: of a classifier; None for a masked language model.
        seed: of a new classification head.

    Returns:
        The model, on the CPU. Code in the checkpoint is not executed.

    Raises:
        TrainingError: if transformers cannot load it, or uses other tensors, heads aside.
    """
    new_head = labels is not None and labels.new
    kind = AutoModelForMaskedLM if labels is None else AutoModelForSequenceClassification
    more: dict[str, Any] = {}
    if labels is not None and labels.new:
        set_seed(seed)
        names = dict(enumerate(labels.names))
        more = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    model, info = _load(kind, checkpoint, dtype=dtype, ignore_mismatched_sizes=True, **more)
    # Heads of other tasks stay as they are, or are left out with a new head.
    unused = [name for name in info["unexpected_keys"] if not is_unused(name)]
    lacking = [name for name in info["missing_keys"] if not (new_head and is_head_name(name))]
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    _refuse_other_tensors(
        checkpoint,
        {"unexpected_keys": unused, "missing_keys": lacking, "mismatched_keys": mismatched},
    )
    return model


def _load(kind: Any, checkpoint: Checkpoint, **more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    folder = checkpoint.folder
    try:
        # The annotation does not cover `output_loading_info`.
        loaded: Any = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **more
        )
    except _LOAD_ERRORS as exc:
        problem = f"cannot be loaded by transformers ({first_line(exc)})"
        raise TrainingError(folder, problem, "try a newer version of transformers") from exc
    return loaded[0], loaded[1]


def _refuse_other_tensors(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    for kind, what in (
        ("unexpected_keys", "has tensors that transformers ignores"),
        ("missing_keys", "lacks tensors that transformers expects"),
        ("mismatched_keys", "has tensors whose shape transformers does not expect"),
    ):
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            problem = f"{what}, so a different model would be trained: {listed(names)}"
            raise TrainingError(
                checkpoint.folder, problem, "save the model with save_pretrained first"
            )


def check_saved_names(
    checkpoint: Checkpoint, model: PreTrainedModel, scratch: Path, *, new_head: bool
) -> None:
    """Check, before training, that the result can be saved under the names of the model.

    transformers may fuse and rename tensors in memory, so the model is saved to find their names.

    Args:
        checkpoint: the model on disk.
        model: the same model in memory.
        scratch: a temporary folder to save it to.
        new_head: whether its classification head is not in the checkpoint.

    Raises:
        TrainingError: if a saved tensor has no counterpart in the checkpoint.
    """
    # With ZeRO-3, a process has only parts of tensors; names are checked after training.
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    pair_trained_tensors(checkpoint, scratch, new_head=new_head)
    shutil.rmtree(scratch)


def load_causal_tokenizer(folder: Path, rows: TrainingRows) -> Any:
    """Load the tokenizer of a causal language model, and check that it can tokenize the rows.

    Args:
        folder: the folder of the model.
        rows: the training rows.

    Returns:
        The tokenizer.

    Raises:
        TrainingError: if there is no tokenizer, or it lacks what the rows need.
        DataError: if the chat template rejects a row.
    """
    tokenizer = _load_tokenizer(folder)
    _require_token(folder, tokenizer, "eos_token", "the end-of-sequence token that ends each row")
    if rows.chat and not tokenizer.chat_template:
        keys = " and ".join(rows.columns)
        problem = f"has no chat template, but the rows of {rows.name} have messages in {keys}"
        remedy = "give rows of text (prompt and completion, or text), or add a chat_template.jinja"
        raise TrainingError(folder, problem, f"{remedy} to the model")
    if rows.chat:
        _try_template(tokenizer, rows)
    return tokenizer


def load_encoder_tokenizer(folder: Path, *, masked: bool) -> Any:
    """Load the tokenizer of a classifier or a masked language model.

    Args:
        folder: the folder of the model.
        masked: whether tokens are masked.

    Returns:
        The tokenizer.

    Raises:
        TrainingError: if there is no tokenizer, or it lacks a token.
    """
    tokenizer = _load_tokenizer(folder)
    if masked:
        _require_token(folder, tokenizer, "mask_token", "the mask token that hides a token")
    _require_token(folder, tokenizer, "pad_token", "the padding token that fills up a batch")
    return tokenizer


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _LOAD_ERRORS as exc:
        problem = f"has no tokenizer that transformers can load ({first_line(exc)})"
        raise TrainingError(folder, problem, "add the files of its tokenizer") from exc


def _require_token(folder: Path, tokenizer: Any, key: str, what: str) -> None:
    if getattr(tokenizer, key) is None:
        problem = f"has a tokenizer without {what}"
        raise TrainingError(folder, problem, f"set {key} in tokenizer_config.json")


def _try_template(tokenizer: Any, rows: TrainingRows) -> None:
    for number, values in enumerate(zip(*rows.columns.values(), strict=True), 1):
        messages = [message for part in values for message in part]
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as exc:  # a template may raise anything
            problem = f"row {number} is rejected by the model's chat template ({first_line(exc)})"
            raise DataError(rows.name, problem, "correct or remove that row") from exc
