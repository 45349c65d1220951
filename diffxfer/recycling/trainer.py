"""Training itself: TRL's SFTTrainer, with a loss for distillation and states to continue from.

Imports torch, transformers, datasets and TRL: only `recycling.tune` imports it, when it trains.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from diffxfer.errors import DataError, OptionError, TrainingError
from diffxfer.recycling.distill import IGNORED, Weights, distillation_terms
from diffxfer.recycling.loading import check_names, first_line, load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, TrainerControl, TrainerState

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.data import Rows
    from diffxfer.recycling.options import TuneOptions
    from diffxfer.recycling.work import WorkFolder

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_TERMS = ("ce", "kl", "hidden")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let transformers and datasets say nothing but errors, and put that back afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()


def make_config(options: TuneOptions, output: Path, device: str | None) -> SFTConfig:
    """The Trainer's settings; making them joins the other processes, if there are any.

    Args:
        options: what was asked for.
        output: where states to continue from go.
        device: ``"cpu"``, ``"cuda"``, or None for a GPU where there is one.

    Returns:
        The settings.

    Raises:
        OptionError: if there is no such device.
        TrainingError: if several GPUs are visible to one process.
    """
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    gpus = 0 if device == "cpu" or launched_on_cpu else torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise OptionError("--device", "torch finds no GPU", "give cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if gpus > 1 and processes == 1:
        raise TrainingError(
            "",
            f"{gpus} GPUs are visible, and one process trains on one",
            "run it as accelerate launch -m diffxfer tune …, or set CUDA_VISIBLE_DEVICES to one",
        )
    # Older releases of transformers know it by the other name alone.
    names = SFTConfig.__dataclass_fields__.keys() & {"activation_checkpointing"}
    checkpointing = next(iter(names), "gradient_checkpointing")
    return SFTConfig(
        output_dir=str(output),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        seed=options.seed,
        max_length=None,  # `_cut` does that, and counts
        use_cpu=gpus == 0,
        ddp_backend="gloo" if gpus == 0 and processes > 1 else None,
        bf16=gpus > 0 and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=gpus > 0,
        logging_steps=1,
        logging_nan_inf_filter=False,  # `_Keeper` is to see them
        save_strategy="no",  # `_Keeper` says when
        report_to=[],
        disable_tqdm=True,
        **{checkpointing: options.gradient_checkpointing},
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """What became of rows that are longer than a row may be.

    Attributes:
        length: the most tokens of a row.
        shortened: how many rows were cut.
        dropped: how many have nothing left to predict, and are not trained on.
    """

    length: int
    shortened: int
    dropped: int


def train(
    model: Checkpoint,
    teacher: Checkpoint | None,
    rows: Rows,
    options: TuneOptions,
    config: SFTConfig,
    work: WorkFolder,
    *,
    length: int,
    progress: Callable[[int, int, float], None] | None,
) -> Cut:
    """Train to the last step, from the newest complete state or from the beginning.

    Args:
        model: what training begins with.
        teacher: what it learns from beside the rows.
        rows: what it learns from.
        options: what was asked for.
        config: the Trainer's settings.
        work: where states to continue from are.
        length: the most tokens of a row.
        progress: called with the steps done, the steps in all and the last step's loss.

    Returns:
        What became of long rows; the trained state is in `work`.

    Raises:
        DiffxferError: if it cannot be done.
    """
    newest = work.newest()
    try:
        trainer = _make_trainer(model, teacher, rows, options, config, work, fresh=newest is None)
        cut = _cut(trainer, length, rows.name)
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.add_callback(_Keeper(trainer, options, work, progress))
        # Its files are pickles, which torch opens with `weights_only`; we wrote them ourselves.
        trainer.train(resume_from_checkpoint=str(newest[1]) if newest else None)
    except (torch.OutOfMemoryError, RuntimeError) as exc:
        if not any(text in str(exc).lower() for text in _NO_MEMORY):
            raise
        raise TrainingError(
            model.folder,
            f"the memory does not suffice ({first_line(exc)})",
            "give a smaller --batch-size with more --gradient-accumulation,"
            " --gradient-checkpointing, or a smaller --max-length",
        ) from exc
    return cut


def _make_trainer(
    model: Checkpoint,
    teacher: Checkpoint | None,
    rows: Rows,
    options: TuneOptions,
    config: SFTConfig,
    work: WorkFolder,
    *,
    fresh: bool,
) -> SFTTrainer:
    tokenizer = load_tokenizer(model.folder, rows)
    student = load_model(model, torch.float32)
    if fresh and config.process_index == 0:
        check_names(model, student, work.path / "names")
    known = {
        "model": student,
        "args": config,
        "train_dataset": datasets.Dataset.from_dict(rows.columns),
        "processing_class": tokenizer,
    }
    if teacher is None:
        trainer = SFTTrainer(**known)
    else:
        guide = load_model(teacher, torch.bfloat16 if config.bf16 else torch.float32)
        weights = Weights(options.distill_weight, options.temperature, options.hidden_weight)
        trainer = _Distiller(guide, weights, **known)
    if trainer.is_fsdp_enabled:
        # Any other kind leaves parts of tensors, which only the same number of processes can read.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    return trainer


def _cut(trainer: SFTTrainer, length: int, name: str) -> Cut:
    """Shorten the rows of a trainer, and leave out those that have nothing to predict."""
    before = trainer.train_dataset

    def shorten(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        short = [(ids[:length], labels[:length]) for ids, labels in pairs]
        # The first token is never predicted.
        kept = [pair for pair in short if any(label != IGNORED for label in pair[1][1:])]
        return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}

    after = before.map(shorten, batched=True, remove_columns=before.column_names)
    if not len(after):
        problem = f"no row has anything to predict within {length} tokens"
        raise DataError(name, problem, "give longer completions, or a larger --max-length")
    trainer.train_dataset = after
    batches = before.select_columns(["input_ids"]).iter(1000)
    shortened = sum(len(ids) > length for batch in batches for ids in batch["input_ids"])
    return Cut(length, shortened, len(before) - len(after))


class _Distiller(SFTTrainer):
    """A trainer that learns from a teacher too; see `recycling.distill`."""

    def __init__(self, teacher: PreTrainedModel, weights: Weights, **known: Any) -> None:
        super().__init__(**known)
        self._teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self._weights = weights
        self._sums: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, as a share of the step's; see `Trainer.compute_loss`.

        Args:
            model: the student, wrapped for other processes where there are any.
            inputs: the batch.
            return_outputs: not supported.
            num_items_in_batch: the predicted tokens of the whole step, in all processes.
        """
        assert not return_outputs
        labels = inputs["labels"]
        read = {name: value for name, value in inputs.items() if name != "labels"}
        read |= {"use_cache": False, "output_hidden_states": self._weights.hidden > 0}
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**read, **more)
        with torch.no_grad():
            taught = self._teacher(**read)
        hidden = (outputs.hidden_states, taught.hidden_states) if self._weights.hidden else None
        logits = outputs.logits, taught.logits
        terms = distillation_terms(*logits, labels, self._weights.temperature, hidden)
        steps = self.current_gradient_accumulation_steps
        if num_items_in_batch is None:  # a mean over the batch, that the Trainer divides further
            count: Tensor | float = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
            share: Tensor | float = 1 / (count * steps)
        else:  # DDP averages over processes what is a share of all of them
            count = num_items_in_batch / self.accelerator.num_processes
            share = 1 / count
        for name in _TERMS:
            term = getattr(terms, name)
            if term is not None:
                self._sums[name] = self._sums.get(name, 0) + term.detach() * share
        loss = self._weights.total(terms) / count
        if self.aux_loss_enabled:
            parts = 1 if num_items_in_batch is None else steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / parts
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms beside the loss.

        Args:
            logs: what the Trainer logs.
            start_time: when training began.
        """
        for name, total in self._sums.items():
            logs[name] = float(self.accelerator.reduce(total, "mean"))
        self._sums.clear()
        super().log(logs, start_time)


class _Keeper(TrainerCallback):
    """Says when states are saved, declares them complete, and looks at every loss."""

    def __init__(
        self,
        trainer: SFTTrainer,
        options: TuneOptions,
        work: WorkFolder,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        self._trainer = trainer
        self._options = options
        self._work = work
        self._progress = progress

    def on_step_end(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        last = state.global_step >= self._options.steps
        if last:
            # Nothing is continued from there: the weights and the log are all that is needed.
            args.save_only_model = True
        control.should_save = last or state.global_step % self._options.interval == 0
        return control

    def on_log(
        self,
        args: SFTConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs:  # the summary at the end
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                what = {"loss": "loss", "grad_norm": "norm of the gradient"}[name]
                raise TrainingError(
                    "",
                    f"the {what} is {logs[name]} at step {state.global_step}",
                    "give a smaller --learning-rate, and look at the rows",
                )
        if self._progress is not None:
            self._progress(state.global_step, self._options.steps, logs["loss"])

    def on_save(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.accelerator.wait_for_everyone()  # each writes a file of its own
        if state.is_world_process_zero:
            self._work.complete(self._work.path / f"checkpoint-{state.global_step}")
