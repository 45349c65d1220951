"""What happens between steps: states to continue from, and a look at the loss.

Imports transformers: only `recycling.trainer` imports it.
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
    """Says when states are saved, declares them complete, and looks at every loss.

    Args:
        trainer: the trainer.
        options: what was asked for.
        workspace: where states to continue from are.
        progress: called with the steps done, the steps in all and the last step's loss.
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
        """Ask for a state at the right steps.

        Args:
            args: the Trainer's settings.
            state: where it is.
            control: what it is to do next.
        """
        last = state.global_step >= self._options.steps
        if last:
            # Nothing is continued from there: the weights and the log are all that is needed.
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
        """Refuse to go on from a loss that is no number, and tell of one that is.

        Args:
            args: the Trainer's settings.
            state: where it is.
            control: what it is to do next.
            more: what it logged, among others.

        Raises:
            TrainingError: if the loss or the gradient is NaN or infinite.
        """
        logs: dict[str, float] = more["logs"]
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
        self,
        args: TrainingArguments,  # noqa: ARG002 the Trainer gives it
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 the Trainer gives it
        **_: Any,
    ) -> None:
        """Declare a state complete.

        Args:
            args: the Trainer's settings.
            state: where it is.
            control: what it is to do next.
        """
        self._trainer.accelerator.wait_for_everyone()  # each writes a file of its own
        if state.is_world_process_zero:
            self._workspace.mark_complete(self._workspace.path / f"checkpoint-{state.global_step}")
