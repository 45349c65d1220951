"""Training of causal language models with TRL's SFTTrainer, with a distillation loss.

The module imports torch, transformers, datasets and TRL; only `recycling.trainer` may import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import torch
from trl import SFTTrainer

from diffxfer.errors import DataError
from diffxfer.recycling.distillation_loss import (
    IGNORED,
    TERMS,
    TermSums,
    Weights,
    distillation_terms,
)
from diffxfer.recycling.model_loading import load_causal_tokenizer, load_model
from diffxfer.recycling.training_report import Truncation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from diffxfer.recycling.training_data import TrainingRows
    from diffxfer.recycling.training_job import TrainingJob


def make_causal_trainer(job: TrainingJob, config: SFTConfig) -> tuple[SFTTrainer, Truncation]:
    """Load the models, and make a trainer with the tokenized rows.

    Args:
        job: what to train.
        config: the Trainer's settings.

    Returns:
        The trainer, and the effect of the maximum length on the rows.

    Raises:
        DiffxferError: if a model, a tokenizer or a row cannot be used.
    """
    rows, options = job.rows, job.options
    known: dict[str, Any] = {
        "processing_class": load_causal_tokenizer(job.model.folder, rows),
        "model": load_model(job.model, torch.float32),
        "args": config,
        "train_dataset": datasets.Dataset.from_dict(rows.columns),
    }
    if job.teacher is None:
        trainer = SFTTrainer(**known)
    else:
        teacher = load_model(job.teacher, torch.bfloat16 if config.bf16 else torch.float32)
        weights = Weights(options.distill_weight, options.temperature, options.hidden_weight)
        trainer = _DistillationTrainer(teacher, weights, **known)
    if not options.end_token:
        _remove_end_tokens(trainer, rows)
    return trainer, _truncate_rows(trainer, job.length, rows.name)


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
        self._sums = TermSums()

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
        for name in TERMS:
            self._sums.add(name, getattr(terms, name), share)
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
        logs |= self._sums.take(self.accelerator)
        super().log(logs, start_time)
