"""Training with the Trainer that the objective needs, from resumable states.

The module imports torch, transformers, datasets and TRL; only `recycling.tune` imports it, when it
trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from diffxfer.errors import TrainingError, first_line
from diffxfer.models.memory import free_memory, is_out_of_memory
from diffxfer.recycling.distributed import run_in_first_process
from diffxfer.recycling.model_loading import check_saved_names
from diffxfer.recycling.objectives import CAUSAL
from diffxfer.recycling.trainer_callback import TrainingCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from trl import SFTConfig

    from diffxfer.recycling.training_job import TrainingJob
    from diffxfer.recycling.training_report import Truncation
    from diffxfer.recycling.training_workspace import TrainingWorkspace


def train(
    job: TrainingJob,
    config: SFTConfig,
    workspace: TrainingWorkspace,
    *,
    progress: Callable[[int, int, float], None] | None,
) -> Truncation:
    """Train to the last step, from the latest complete state or from the beginning.

    Args:
        job: what to train.
        config: the Trainer's settings.
        workspace: the folder of saved states.
        progress: called with the number of steps done, the total, and the loss of the last step.

    Returns:
        The effect of the maximum length on the rows; the trained state is in `workspace`.

    Raises:
        DiffxferError: if training fails for a known reason.
    """
    newest = workspace.latest_state()
    trainer: Any = None
    try:
        trainer, truncation = _make_trainer(job, config)
        if newest is None:
            scratch = workspace.path / "names"
            new_head = job.labels is not None and job.labels.new
            run_in_first_process(
                config,
                lambda: check_saved_names(job.model, trainer.model, scratch, new_head=new_head),
            )
        if trainer.is_fsdp_enabled:
            # Other types save parts of tensors, which only the same number of processes can read.
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.remove_callback(PrinterCallback)  # it writes to stdout
        trainer.add_callback(TrainingCallback(trainer, job.options, workspace, progress))
        # The state has pickles. diffxfer wrote them, and torch reads them with `weights_only`.
        trainer.train(resume_from_checkpoint=str(newest[1]) if newest else None)
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        raise TrainingError(
            job.model.folder,
            f"training ran out of memory ({first_line(exc)})",
            "give a smaller --batch-size with more --gradient-accumulation,"
            " --gradient-checkpointing, or a smaller --max-length",
        ) from exc
    finally:
        # The Trainer and its callback refer to each other and keep the model in memory.
        trainer = None
        free_memory()
    return truncation


def _make_trainer(job: TrainingJob, config: SFTConfig) -> tuple[Any, Truncation]:
    if job.options.objective == CAUSAL:
        from diffxfer.recycling.causal_trainer import make_causal_trainer

        return make_causal_trainer(job, config)
    from diffxfer.recycling.encoder_trainer import make_encoder_trainer

    return make_encoder_trainer(job, config)
