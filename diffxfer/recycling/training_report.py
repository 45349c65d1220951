"""The result of `tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What a training run did.

    Attributes:
        command: ``"tune"``.
        output: the folder that was written.
        steps: the number of training steps in all.
        continued_from: the step from which an interrupted run was resumed; 0 for a new run.
        rows: the number of training rows.
        log: one entry per step: `step`, `loss`, `learning_rate`, `grad_norm`; with a teacher also
            the unweighted terms of the loss: `ce`, `kl`, and `hidden` if it is used.
        tensors: the number of tensors that were tuned and copied.
        parameters: the number of elements of these tensors.
        bytes_to_write: the size of the shards.
        elapsed_s: the duration of the call in seconds.
        warnings: one line each.
    """

    command: str
    output: Path
    steps: int
    continued_from: int
    rows: int
    log: tuple[dict[str, float], ...]
    tensors: dict[str, int]
    parameters: dict[str, int]
    bytes_to_write: int
    elapsed_s: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        from dataclasses import asdict

        return {**asdict(self), "output": str(self.output)}
