"""Errors for an adapter that does not fit its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_WEIGHTS, merge_remedy
from diffxfer.checkpoints.header import short
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.stored import TensorSpec


@dataclass(frozen=True, slots=True)
class AdapterErrors:
    """The errors for an adapter and a model.

    Attributes:
        adapter: the adapter.
        role: the role of the model.
        renamed: whether transformers may load the model's tensors under other names, and it is
            not known which.
    """

    adapter: Adapter
    role: str
    renamed: bool

    def misfit(self, spec: TensorSpec, problem: str, otherwise: str = "") -> CheckpointError:
        """The error for a tensor of the adapter that does not fit base.

        Args:
            spec: the tensor.
            problem: what does not fit.
            otherwise: another remedy.
        """
        stated = self.adapter.config.base
        made = f", which was made for {stated}" if stated else ""
        remedy = f"give the base of this adapter{made}{otherwise}"
        return CheckpointError(self._where, f"{short(spec.name)} {problem}", remedy)

    def unknown(self, spec: TensorSpec, name: str) -> CheckpointError:
        """The error for a tensor that base has not, or not under this name.

        Args:
            spec: the tensor of the adapter.
            name: what it changes.
        """
        merge = merge_remedy(self.adapter.place)
        problem = f"changes {name}, and {self.role} has no such tensor"
        if not self.renamed:
            return self.misfit(spec, problem, f"; or {merge}")
        problem = (
            f"changes {name}, which {self.role} stores under other names, and the installed"
            " transformers does not say which"
        )
        return CheckpointError(self._where, f"{short(spec.name)} {problem}", merge)

    def needs_base(self, spec: TensorSpec, what: str) -> CheckpointError:
        """The error for a Δ that cannot be computed without base.

        Args:
            spec: the tensor of the adapter.
            what: what kind of tensor it is.
        """
        return CheckpointError(
            self._where,
            f"{short(spec.name)} ({what}) has a Δ that depends on the adapter's base",
            "give base too: diffxfer transfer ADAPTER BASE TARGET -o OUT",
        )

    @property
    def _where(self) -> str:
        return f"{self.adapter.place.label}/{ADAPTER_WEIGHTS}"
