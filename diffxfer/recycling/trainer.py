"""Training with TRL's SFTTrainer, with a distillation loss and resumable states.

The module imports torch, transformers, datasets and TRL; only `recycling.tune` imports it, when it
trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import PrinterCallback
from trl import SFTTrainer

from diffxfer.errors import DataError, TrainingError, first_line
from diffxfer.models.memory import free_memory, is_out_of_memory
from diffxfer.recycling.distillation_loss import IGNORED, Weights, distillation_terms
from diffxfer.recycling.distributed import run_in_first_process
from diffxfer.recycling.model_loading import (
    check_saved_names,
    load_model,
    load_tokenizer,
)
from diffxfer.recycling.trainer_callback import TrainingCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.training_data import TrainingRows
    from diffxfer.recycling.training_options import TuneOptions
    from diffxfer.recycling.training_workspace import TrainingWorkspace

_TERMS = ("ce", "kl", "hidden")


@dataclass(frozen=True, slots=True)
class Truncation:
    """The effect of the maximum length on the training rows.

    Attributes:
        length: the maximum number of tokens of a row.
        shortened: the number of rows that were truncated.
        dropped: the number of rows that were dropped because no token to predict was left.
    """

    length: int
    shortened: int
    dropped: int


def train(
    model: Checkpoint,
    teacher: Checkpoint | None,
    rows: TrainingRows,
    options: TuneOptions,
    config: SFTConfig,
    workspace: TrainingWorkspace,
    *,
    length: int,
    progress: Callable[[int, int, float], None] | None,
) -> Truncation:
    """Train to the last step, from the latest complete state or from the beginning.

    Args:
        model: the model to train.
        teacher: the model to learn from, in addition to the rows.
        rows: the training rows.
        options: the options of the run.
        config: the Trainer's settings.
        workspace: the folder of saved states.
        length: the maximum number of tokens of a row.
        progress: called with the number of steps done, the total, and the loss of the last step.

    Returns:
        The effect of `length` on the rows; the trained state is in `workspace`.

    Raises:
        DiffxferError: if training fails for a known reason.
    """
    newest = workspace.latest_state()
    trainer: Any = None
    try:
        trainer = _make_trainer(
            model, teacher, rows, options, config, workspace, fresh=newest is None
        )
        if not options.end_token:
            _remove_end_tokens(trainer, rows)
        truncation = _truncate_rows(trainer, length, rows.name)
        trainer.remove_callback(PrinterCallback)  # it writes to stdout
        trainer.add_callback(TrainingCallback(trainer, options, workspace, progress))
        # The state has pickles. diffxfer wrote them, and torch reads them with `weights_only`.
        trainer.train(resume_from_checkpoint=str(newest[1]) if newest else None)
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        raise TrainingError(
            model.folder,
            f"training ran out of memory ({first_line(exc)})",
            "give a smaller --batch-size with more --gradient-accumulation,"
            " --gradient-checkpointing, or a smaller --max-length",
        ) from exc
    finally:
        # The Trainer and its callback refer to each other and keep the model in memory.
        trainer = None
        free_memory()
    return truncation


def _make_trainer(
    model: Checkpoint,
    teacher: Checkpoint | None,
    rows: TrainingRows,
    options: TuneOptions,
    config: SFTConfig,
    workspace: TrainingWorkspace,
    *,
    fresh: bool,
) -> SFTTrainer:
    tokenizer = load_tokenizer(model.folder, rows)
    student = load_model(model, torch.float32)
    if fresh:
        run_in_first_process(
            config, lambda: check_saved_names(model, student, workspace.path / "names")
        )
    known: dict[str, Any] = {
        "model": student,
        "args": config,
        "train_dataset": datasets.Dataset.from_dict(rows.columns),
        "processing_class": tokenizer,
    }
    if teacher is None:
        trainer = SFTTrainer(**known)
    else:
        teacher_model = load_model(teacher, torch.bfloat16 if config.bf16 else torch.float32)
        weights = Weights(options.distill_weight, options.temperature, options.hidden_weight)
        trainer = _DistillationTrainer(teacher_model, weights, **known)
    if trainer.is_fsdp_enabled:
        # Other types save parts of tensors, which only the same number of processes can read.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    return trainer


def _remove_end_tokens(trainer: SFTTrainer, rows: TrainingRows) -> None:
    """Remove the end token that TRL adds to each row; one that a text has itself stays."""
    dataset = trainer.train_dataset
    assert isinstance(dataset, datasets.Dataset)
    texts = rows.columns["completion" if "completion" in rows.columns else "text"]
    tokenizer: Any = trainer.processing_class
    end = tokenizer.eos_token

    def remove(row: dict[str, list[int]], number: int) -> dict[str, list[int]]:
        own = texts[number].endswith(end) or row["input_ids"][-1] != tokenizer.eos_token_id
        return row if own else {name: values[:-1] for name, values in row.items()}

    trainer.train_dataset = dataset.map(remove, with_indices=True)


def _truncate_rows(trainer: SFTTrainer, length: int, name: str) -> Truncation:
    """Truncate the trainer's rows, and drop those that have no token to predict."""
    before = trainer.train_dataset
    assert isinstance(before, datasets.Dataset)

    def shorten(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        short = [(ids[:length], labels[:length]) for ids, labels in pairs]
        # No token precedes the first one, so it is never predicted.
        kept = [pair for pair in short if any(label != IGNORED for label in pair[1][1:])]
        return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}

    after = before.map(shorten, batched=True, remove_columns=before.column_names)
    if not len(after):
        problem = f"no row has a token to predict within {length} tokens"
        raise DataError(name, problem, "give longer completions, or a larger --max-length")
    trainer.train_dataset = after
    batches = before.select_columns(["input_ids"]).iter(1000)
    shortened = sum(len(ids) > length for batch in batches for ids in batch["input_ids"])
    return Truncation(length, shortened, len(before) - len(after))


class _DistillationTrainer(SFTTrainer):
    """An SFTTrainer with the loss of `recycling.distillation_loss`."""

    def __init__(self, teacher: PreTrainedModel, weights: Weights, **known: Any) -> None:
        super().__init__(**known)
        self._teacher = teacher.requires_grad_(False)  # `from_pretrained` returns it in eval mode
        torch.nn.Module.to(self._teacher, self.args.device)
        self._loss_weights = weights
        self._term_sums: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The contribution of a batch to the loss of the step; see `Trainer.compute_loss`.

        Args:
            model: the student, wrapped for distributed training if there are several processes.
            inputs: the batch.
            return_outputs: not supported.
            num_items_in_batch: the number of predicted tokens of the step, over all processes.
        """
        assert not return_outputs
        labels = inputs["labels"]
        read = {name: value for name, value in inputs.items() if name != "labels"}
        read |= {"use_cache": False, "output_hidden_states": self._loss_weights.hidden > 0}
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**read, **more)
        with torch.no_grad():
            taught = self._teacher(**read)
        hidden = (
            (outputs.hidden_states, taught.hidden_states) if self._loss_weights.hidden else None
        )
        logits = outputs.logits, taught.logits
        terms = distillation_terms(*logits, labels, self._loss_weights.temperature, hidden)
        steps = self.current_gradient_accumulation_steps
        # Then the result is a mean over the batch, which the Trainer divides by `steps`.
        if num_items_in_batch is None:
            count: Tensor | float = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
            share: Tensor | float = 1 / (count * steps)
        else:  # DDP averages over the processes, although `count` covers all of them
            count = num_items_in_batch / self.accelerator.num_processes
            share = 1 / count
        for name in _TERMS:
            term = getattr(terms, name)
            if term is not None:
                self._term_sums[name] = self._term_sums.get(name, 0) + term.detach() * share
        loss = self._loss_weights.total(terms) / count
        if self.aux_loss_enabled:
            parts = 1 if num_items_in_batch is None else steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / parts
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss to what the Trainer logs.

        Args:
            logs: the values that the Trainer logs.
            start_time: the time at which training began.
        """
        for name, total in self._term_sums.items():
            logs[name] = float(self.accelerator.reduce(total, "mean"))
        self._term_sums.clear()
        super().log(logs, start_time)
