"""The result of `tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


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

    def warnings(self) -> list[str]:
        """What happened to the rows, one line each."""
        found = []
        if self.shortened:
            found.append(f"rows truncated to {self.length} tokens: {self.shortened:,}")
        if self.dropped:
            found.append(f"rows dropped, since they have no token to predict: {self.dropped:,}")
        return found


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What a training run did.

    Attributes:
        command: ``"tune"``.
        objective: what was predicted: ``"causal"``, ``"classification"`` or ``"mlm"``.
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
        notes: information, one line each, such as that a classification head is new.
    """

    command: str
    objective: str
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
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        from dataclasses import asdict

        return {**asdict(self), "output": str(self.output)}
