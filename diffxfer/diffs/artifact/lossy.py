"""What the manifest of a diff vector says if it is packed with a loss."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

_Ratio: TypeAlias = Annotated[FiniteFloat, Field(ge=0)]


class LossyEntry(BaseModel):
    """What a diff vector that is packed with a loss has lost.

    Attributes:
        form: ``"int8"`` or ``"int4"``.
        error: ‖stored Δ − Δ‖₂ / ‖Δ‖₂.
        worst: the largest such ratio of a tensor.
        worst_tensor: its name.
        layers: the ratio of each layer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    form: Literal["int8", "int4"]
    error: _Ratio
    worst: _Ratio
    worst_tensor: str
    layers: dict[str, _Ratio]
