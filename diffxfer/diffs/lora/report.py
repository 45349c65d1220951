"""The report of an adapter: what it keeps of Δ, by tensor and by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.artifact.kept import LayerKept, by_layer, share
from diffxfer.diffs.jobs.report import Report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.artifact.manifest import FactorEntry


@dataclass(frozen=True, slots=True)
class AdapterReport(Report):
    """The report of `extract_diff` for an adapter.

    Attributes:
        kept: the share of ‖Δ‖² that the adapter keeps.
        layers: what it keeps of each layer.
        factors: what it keeps of each tensor of Δ, by name; empty for a dry run.
    """

    kept: float = 1.0
    layers: tuple[LayerKept, ...] = ()
    factors: Mapping[str, FactorEntry] | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        made = {field.name: getattr(self, field.name) for field in fields(Report)}
        factors = {name: entry.model_dump() for name, entry in (self.factors or {}).items()}
        layers = [asdict(layer) for layer in self.layers]
        plain = Report(**made).as_json()
        return {**plain, "kept": self.kept, "layers": layers, "factors": factors}


def with_factors(report: Report, factors: Mapping[str, FactorEntry]) -> AdapterReport:
    """The report of an adapter.

    Args:
        report: the report of its job.
        factors: what it keeps, by tensor.
    """
    made = {field.name: getattr(report, field.name) for field in fields(Report)}
    return AdapterReport(**made, kept=share(factors), layers=by_layer(factors), factors=factors)
