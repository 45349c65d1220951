"""The result of `probe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.probing.distances import Distances


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Whether a graft will work, and why, as far as it was measured.

    Attributes:
        models: the models as the user named them, by role.
        distances: how far the models are from each other.
        forecast: how much of the gain of direct fine-tuning a graft may recover.
        paths: score and loss along straight lines between models.
        attention: how similar the attention of corresponding heads is.
        hidden: how similar hidden states are.
        agreement: how often the graft and finetuned predict the same.
        alphas: the target, its own fine-tune and the graft at each alpha, on rows and tasks.
        activations: how much the target's layers change what base's compute.
        warnings: one line each.
        elapsed_s: seconds from the call to the result.
        output: the folder of the page; None if there is none.
    """

    models: Mapping[str, str]
    distances: Distances
    forecast: Any | None = None
    paths: Any | None = None
    attention: Any | None = None
    hidden: Any | None = None
    agreement: Any | None = None
    alphas: Any | None = None
    activations: Any | None = None
    warnings: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    output: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has; a part that was not measured is null."""
        found = {name: _as_json(getattr(self, name)) for name in self.__dataclass_fields__}
        output = None if self.output is None else str(self.output)
        more = {"models": dict(self.models), "warnings": list(self.warnings), "output": output}
        return {**found, **more}


def _as_json(part: Any) -> Any:
    """A part of the report: it, or each of several, says itself what it is in JSON."""
    if isinstance(part, list | tuple):
        return [_as_json(each) for each in part]
    return part.as_json() if hasattr(part, "as_json") else part
