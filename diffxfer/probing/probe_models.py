"""The models of a probe, each opened when it is first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.companions import read_config
from diffxfer.checkpoints.resolve import find
from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.graft import transfer_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import ExitStack

    from diffxfer.diffs.grafting.options import WeightOptions
    from diffxfer.models.source import ModelSource

PAIRS = (
    ("finetuned", "direct"),
    ("graft", "direct"),
    ("base", "target"),
    ("finetuned", "base"),
    ("graft", "finetuned"),
)
"""The pairs whose functions are compared; those with `direct` only if it is given."""
PATHS = PAIRS[:3]
"""The pairs between which a path is measured."""


class ProbeModels:
    """Opens the models of a probe by role; the graft is made of three of them, in memory.

    Args:
        named: the models as the user named them, by role.
        stack: closes them.
        options: how a graft is made, besides alpha.
        progress: called with the bytes present and the total bytes of a download.
    """

    def __init__(
        self,
        named: Mapping[str, str],
        stack: ExitStack,
        options: WeightOptions,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._named, self._stack, self._options = named, stack, options
        self._progress = progress
        self._open: dict[tuple[str, float], ModelSource] = {}

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles: those that were named, and the graft."""
        return (*self._named, "graft")

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of some pairs of which both models are there.

        Args:
            pairs: pairs of roles.
        """
        return [pair for pair in pairs if set(pair) <= set(self.roles)]

    def source(self, role: str, alpha: float = 1.0) -> ModelSource:
        """A model's weights; the source is closed with all others.

        Args:
            role: one of `roles`.
            alpha: the scale of Δ, for a graft.

        Raises:
            DiffxferError: if it cannot be opened, or a graft cannot be made.
        """
        key = role, alpha if role == "graft" else 0.0
        if key not in self._open:
            found = self._stack.enter_context(self._make(role, alpha))
            found.label = role
            self._open[key] = found
        return self._open[key]

    def _make(self, role: str, alpha: float) -> ModelSource:
        named = self._named
        if role == "graft":
            models = named["finetuned"], named["base"], named["target"]
            return transfer_source(*models, alpha, **self._options)
        if is_adapter(find(named[role], "a model")):
            # An adapter becomes a model by being grafted on its own base.
            base = named["target" if role == "direct" else "base"]
            return transfer_source(named[role], base, base)
        return checkpoint_source(named[role], progress=self._progress)

    def configs(self, roles: Sequence[str]) -> list[Mapping[str, Any]]:
        """The configs of some models.

        Args:
            roles: some of `roles`.
        """
        return [read_config(self.source(role).folder) for role in roles]
