"""What tuning tells its caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What was done.

    Attributes:
        command: ``"tune"``.
        output: the folder.
        steps: how many were made in all.
        continued_from: the step at which a run that was cut off was continued, 0 if it was not.
        rows: how many there were to train on.
        log: one entry a step: `step`, `loss`, `learning_rate`, `grad_norm`; with a teacher also
            the terms of the loss, unweighted: `ce`, `kl`, and `hidden` where it takes part.
        tensors: how many tensors had each fate: tuned, copied.
        parameters: how many elements those have.
        bytes_to_write: of shards.
        elapsed_s: seconds from the call to the result.
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
        """The same as values that JSON has."""
        from dataclasses import asdict

        return {**asdict(self), "output": str(self.output)}
