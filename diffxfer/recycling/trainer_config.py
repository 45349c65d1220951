"""The settings of the Trainer, and the verbosity of its libraries.

The module imports torch, transformers, datasets and TRL; only `recycling.tune` imports it, when it
trains.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers.utils import logging
from trl import SFTConfig

from diffxfer.errors import OptionError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffxfer.recycling.training_options import TuneOptions


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Reduce the output of transformers and datasets to errors inside the block.

    `TRANSFORMERS_VERBOSITY`, if it is set, still decides for transformers.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    asked = os.environ.get("TRANSFORMERS_VERBOSITY", "error")
    logging.set_verbosity(logging.log_levels.get(asked, logging.log_levels["error"]))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not data_bars:
            datasets.enable_progress_bars()


def make_trainer_config(options: TuneOptions, output: Path, device: str | None) -> SFTConfig:
    """Make the Trainer's settings, which also connects the processes of a distributed run.

    Args:
        options: the options of the run.
        output: the folder for saved states.
        device: ``"cpu"``, ``"cuda"``, or None for a GPU if there is one.

    Returns:
        The settings.

    Raises:
        OptionError: if the device does not exist.
        TrainingError: if one process sees several GPUs.
    """
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    gpus = 0 if device == "cpu" or launched_on_cpu else torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise OptionError("device", "torch finds no GPU", "give cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if gpus > 1 and processes == 1:
        raise TrainingError(
            "",
            f"{gpus} GPUs are visible, but one process trains on one GPU",
            "run accelerate launch --multi_gpu -m diffxfer tune …, or select one with"
            " CUDA_VISIBLE_DEVICES",
        )
    # Older releases of transformers have only the other name.
    name = "activation_checkpointing"
    known = name in SFTConfig.__dataclass_fields__
    checkpointing: dict[str, Any] = {
        name if known else "gradient_checkpointing": options.gradient_checkpointing
    }
    return SFTConfig(
        output_dir=str(output),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        seed=options.seed,
        max_length=None,  # `trainer` truncates the rows and counts them
        use_cpu=gpus == 0,
        ddp_backend="gloo" if gpus == 0 and processes > 1 else None,
        bf16=gpus > 0 and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=gpus > 0,
        logging_steps=1,
        logging_nan_inf_filter=False,  # `TrainingCallback` checks them
        save_strategy="no",  # `TrainingCallback` decides
        report_to=[],
        disable_tqdm=True,
        **checkpointing,
    )
