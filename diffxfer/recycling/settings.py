"""The settings of transformers' Trainer, and how its libraries talk.

Imports torch, transformers, datasets and TRL: only `recycling.tune` imports it, when it trains.
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

    from diffxfer.recycling.options import TuneOptions


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let transformers and datasets say nothing but errors, and put that back afterwards.

    transformers says what `TRANSFORMERS_VERBOSITY` asks for, where it does.
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
        raise OptionError("device", "torch finds no GPU", "give cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if gpus > 1 and processes == 1:
        raise TrainingError(
            "",
            f"{gpus} GPUs are visible, and one process trains on one",
            "run it as accelerate launch --multi_gpu -m diffxfer tune …, or name one in"
            " CUDA_VISIBLE_DEVICES",
        )
    # Older releases of transformers know it by the other name alone.
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
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        seed=options.seed,
        max_length=None,  # `trainer` does that, and counts
        use_cpu=gpus == 0,
        ddp_backend="gloo" if gpus == 0 and processes > 1 else None,
        bf16=gpus > 0 and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=gpus > 0,
        logging_steps=1,
        logging_nan_inf_filter=False,  # `Keeper` is to see them
        save_strategy="no",  # `Keeper` says when
        report_to=[],
        disable_tqdm=True,
        **checkpointing,
    )
