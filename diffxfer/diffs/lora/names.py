"""The names that PEFT uses for a model's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.delta.loaded_names import loaded_names, may_differ
from diffxfer.diffs.lora.peft_config import model_prefix
from diffxfer.diffs.matching.names import is_head

if TYPE_CHECKING:
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.delta.loaded_names import LoadedNames


@dataclass(frozen=True, slots=True)
class PeftNames:
    """The names that PEFT uses for the tensors of a model.

    Attributes:
        prefix: the beginning of names that those on disk lack, if transformers was not asked.
        loaded: what transformers says of the model; None if its names are those on disk.
        unknown: whether the names may be others, and transformers does not say which.
    """

    prefix: str = ""
    loaded: LoadedNames | None = None
    unknown: bool = False

    def of(self, name: str) -> str:
        """The name that PEFT uses.

        Args:
            name: the name on disk.
        """
        if self.loaded is not None:
            return self.loaded.names.get(name, name)
        return name if is_head(name) else self.prefix + name

    def has(self, name: str) -> bool:
        """Whether the loaded model has a tensor as it is.

        Args:
            name: the name on disk.
        """
        return self.loaded is None or is_head(name) or name in self.loaded.names

    def is_stacked(self, name: str) -> bool:
        """Whether a tensor is a part of a stacked parameter.

        Args:
            name: the name on disk.
        """
        return self.loaded is not None and self.loaded.parent(name) is not None

    def is_shared(self, name: str) -> bool:
        """Whether the loaded model uses a tensor in several places.

        Args:
            name: the name on disk.
        """
        return self.loaded is not None and self.of(name) in self.loaded.shared


def peft_names(base: Checkpoint) -> PeftNames:
    """Find the names that PEFT uses for the tensors of a model.

    Args:
        base: the model.
    """
    if may_differ(base):
        loaded = loaded_names(base)
        if loaded is not None:
            return PeftNames(loaded=loaded)
        return PeftNames(model_prefix(base.config, base.tensors.keys()), unknown=True)
    return PeftNames(model_prefix(base.config, base.tensors.keys()))
