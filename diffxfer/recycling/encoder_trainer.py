"""Training of classifiers and masked language models with transformers' Trainer.

The module imports torch and transformers; only `recycling.trainer` may import it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch.nn import functional
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer

from diffxfer.errors import OptionError, TrainingError
from diffxfer.models.input_length import longest_input
from diffxfer.recycling.distillation_loss import (
    IGNORED,
    TERMS,
    Terms,
    TermSums,
    Weights,
    aligned_terms,
    row_distances,
)
from diffxfer.recycling.encoder_rows import ROW, SPECIAL, tokenize_rows
from diffxfer.recycling.model_loading import load_encoder, load_encoder_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from diffxfer.recycling.training_job import TrainingJob
    from diffxfer.recycling.training_report import Truncation

MASKED_SHARE = 0.15
"""The share of tokens that are predicted, as BERT and RoBERTa were trained."""


class EncoderTrainer(Trainer):
    """A Trainer whose loss is a mean over the predicted tokens, or the rows, of a whole step.

    The models' own losses are means over a batch, so with gradient accumulation or several
    processes a token of a batch with few masks would weigh more.

    Args:
        masks: masks the tokens of each batch; None for a classifier.
        teacher: the model to learn from as well.
        weights: the weights of the terms of the loss.
        known: the arguments of `transformers.Trainer`.
    """

    def __init__(
        self, masks: Masks | None, teacher: PreTrainedModel | None, weights: Weights, **known: Any
    ) -> None:
        super().__init__(**known)
        # `get_batch_samples` counts for every model, so the loss is never a mean over a batch.
        self.model_accepts_loss_kwargs = True
        self._masks = masks
        self._teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            torch.nn.Module.to(teacher, self.args.device)
        self._loss_weights = weights
        self._sums = TermSums()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch and mask the batches of a step, and count what is predicted in them.

        Masks are made here, since the data loader fetches one batch ahead: here the number of the
        step is known, so a resumed run makes the same masks.

        Args:
            epoch_iterator: the batches of the epoch.
            num_batches: the number of batches of the step.
            device: where to put the count.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._masks is not None:
            batches = [self._masks.apply(batch, self.state.global_step) for batch in batches]
        counts = [(batch["labels"] != IGNORED).sum() for batch in batches]
        count = torch.stack(counts).sum().to(device) if counts else torch.tensor(0, device=device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count

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
            num_items_in_batch: the number of predictions of the step, over all processes.
        """
        assert not return_outputs
        assert isinstance(num_items_in_batch, torch.Tensor)
        # DDP averages over the processes, although the count covers all of them. A step without
        # any mask has the loss 0.
        share = self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        labels = inputs["labels"]
        read = {name: value for name, value in inputs.items() if name != "labels"}
        if self._teacher is None:
            logits = model(**read).logits
            wanted = labels != IGNORED
            ce = functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")
            return ce * share
        terms = self._distillation_terms(model, self._teacher, read, labels)
        for name in TERMS:
            self._sums.add(name, getattr(terms, name), share)
        return self._loss_weights.total(terms) * share

    def _distillation_terms(
        self, model: Any, teacher: Any, read: dict[str, Any], labels: Tensor
    ) -> Terms:
        compared = self._loss_weights.hidden > 0
        outputs = model(**read, output_hidden_states=compared)
        with torch.no_grad():
            taught = teacher(**read, output_hidden_states=compared)
        logits, temperature = (outputs.logits, taught.logits), self._loss_weights.temperature
        if not compared:
            return aligned_terms(*logits, labels, temperature)
        hidden = outputs.hidden_states, taught.hidden_states
        if self._masks is not None:
            return aligned_terms(*logits, labels, temperature, hidden)
        terms = aligned_terms(*logits, labels, temperature)
        return Terms(terms.ce, terms.kl, row_distances(hidden, read["attention_mask"]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss to what the Trainer logs.

        Args:
            logs: the values that the Trainer logs.
            start_time: the time at which training began.
        """
        logs |= self._sums.take(self.accelerator)
        super().log(logs, start_time)


class Masks:
    """The masks of tokens: those of a row depend on the seed, the step and the row alone.

    So a resumed run has the same ones, however many batches or processes share a step.

    Args:
        tokenizer: of transformers, with a mask token.
        seed: the seed of the run.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE)
        self._seed = seed

    def apply(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """A batch with masked tokens, and as labels the tokens to predict.

        Args:
            batch: `input_ids`, `attention_mask` and `special_tokens_mask`, each of shape
                `(batch, length)`, and the position in the file of each row.
            step: the number of steps done.
        """
        device = batch["input_ids"].device
        ids = batch["input_ids"].cpu().clone()
        labels = torch.full_like(ids, IGNORED)
        kept, special = batch["attention_mask"].cpu().bool(), batch[SPECIAL].cpu()
        for place, row in enumerate(batch[ROW].tolist()):
            seed = xxhash.xxh3_64_intdigest(f"{self._seed} {step} {row}".encode()) >> 1
            self._collator.generator = torch.Generator().manual_seed(seed)
            real = kept[place]
            masked, due = self._collator.torch_mask_tokens(
                ids[place, real][None], special_tokens_mask=special[place, real][None]
            )
            ids[place, real], labels[place, real] = masked[0], due[0]
        rest = {name: value for name, value in batch.items() if name not in (ROW, SPECIAL)}
        return {**rest, "input_ids": ids.to(device), "labels": labels.to(device)}


def make_encoder_trainer(job: TrainingJob, config: SFTConfig) -> tuple[EncoderTrainer, Truncation]:
    """Load the models, and make a trainer with the tokenized rows.

    Args:
        job: what to train.
        config: the Trainer's settings.

    Returns:
        The trainer, and the effect of the maximum length on the rows.

    Raises:
        DiffxferError: if a model, a tokenizer or a row cannot be used.
    """
    options, masked = job.options, job.labels is None
    tokenizer = load_encoder_tokenizer(job.model.folder, masked=masked)
    model: Any = load_encoder(job.model, torch.float32, job.labels, options.seed)
    _check_vocabulary(job, len(tokenizer), model)
    if options.gradient_checkpointing and not model.supports_gradient_checkpointing:
        problem = f"is not supported by {type(model).__name__}"
        raise OptionError("--gradient-checkpointing", problem, "omit it, and use smaller batches")
    if model.config.pad_token_id is None:  # a decoder finds the last token of a row by it
        model.config.pad_token_id = tokenizer.pad_token_id
    teacher = None
    if job.teacher is not None:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        labels = None if job.labels is None else replace(job.labels, new=False)
        teacher = load_encoder(job.teacher, dtype, labels, options.seed)
        teacher.config.pad_token_id = model.config.pad_token_id
    # The teacher reads the same tokens.
    readers = [one for one in (model, teacher) if one is not None]
    lengths = [longest_input(one, tokenizer, job.length) for one in readers]
    dataset, truncation = tokenize_rows(
        *(job.rows, job.labels, tokenizer),
        length=min(filter(None, lengths)),
        inputs=_inputs(model),
    )
    config.remove_unused_columns = False  # those of the masks are no inputs of the model
    trainer = EncoderTrainer(
        Masks(tokenizer, options.seed) if masked else None,
        teacher,
        Weights(options.distill_weight, options.temperature, options.hidden_weight),
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    return trainer, truncation


def _check_vocabulary(job: TrainingJob, tokens: int, model: Any) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if tokens > rows:
        problem = f"has a tokenizer of {tokens} tokens, but its embedding has {rows} rows"
        raise TrainingError(job.model.folder, problem, "add the tokenizer that belongs to it")


def _inputs(model: Any) -> set[str]:
    """The inputs that the model takes; without those that tell texts apart, if it has one kind."""
    found = {*inspect.signature(model.forward).parameters}
    kinds = getattr(model.config, "type_vocab_size", 0)
    return found if kinds and kinds > 1 else found - {"token_type_ids"}
