"""The weights of a model: of a checkpoint, a graft, or a mixture of two models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch


class ModelSource(ABC):
    """Tensors under the names of a checkpoint on disk, each made when it is asked for.

    Attributes:
        label: the model's name for the user.
        folder: a folder with the model's config, tokenizer and chat template.
    """

    label: str
    folder: Path

    @abstractmethod
    def names(self) -> Iterator[str]:
        """The names of all tensors, in the order in which they are stored."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in the dtype and with the bits that it would have on disk.

        Args:
            name: one of `names`.

        Raises:
            DiffxferError: if an input cannot be read or has changed.
        """
