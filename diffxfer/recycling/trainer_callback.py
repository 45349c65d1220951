"""The Trainer's callback: it saves states to resume from and checks the loss of each step.

The module imports transformers; only `recycling.trainer` may import it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from diffxfer.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from diffxfer.recycling.training_options import TuneOptions
    from diffxfer.recycling.training_workspace import TrainingWorkspace


class TrainingCallback(TrainerCallback):
    """Decides when training state is saved, marks it complete, and checks the loss of each step.

    Args:
        trainer: the trainer.
        options: the options of the run.
        workspace: where states are saved.
        progress: called with the number of steps done, the total, and the loss of the last step.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: TuneOptions,
        workspace: TrainingWorkspace,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        self._trainer = trainer
        self._options = options
        self._workspace = workspace
        self._progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Request a save every `save_interval` steps and after the last one.

        Args:
            args: the Trainer's settings.
            state: where it is.
            control: what it is to do next.
        """
        last = state.global_step >= self._options.steps
        if last:
            # No run resumes from the last step, so the optimizer's state is not needed.
            args.save_only_model = True
        control.should_save = last or state.global_step % self._options.save_interval == 0
        return control

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 the Trainer gives it
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 the Trainer gives it
        **more: Any,
    ) -> None:
        """Report the loss of a step; stop training if it is not finite.

        Args:
            args: the Trainer's settings.
            state: where it is.
            control: what it is to do next.
            more: further arguments of the Trainer, among them `logs`.

        Raises:
            TrainingError: if the loss or the gradient is NaN or infinite.
        """
        logs: dict[str, float] = more["logs"]
        if "loss" not in logs:  # the Trainer's summary after the last step
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                what = {"loss": "loss", "grad_norm": "norm of the gradient"}[name]
                raise TrainingError(
                    "",
                    f"the {what} is {logs[name]} at step {state.global_step}",
                    "give a smaller --learning-rate, or check the training rows",
                )
        if self._progress is not None:
            self._progress(state.global_step, self._options.steps, logs["loss"])

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002 the Trainer gives it
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 the Trainer gives it
        **_: Any,
    ) -> None:
        """Mark a saved state complete.

        Args:
            args: the Trainer's settings.
            state: where it is.
            control: what it is to do next.
        """
        self._trainer.accelerator.wait_for_everyone()  # each process writes its own files
        if state.is_world_process_zero:
            self._workspace.mark_complete(self._workspace.path / f"checkpoint-{state.global_step}")
