"""The weights of a model: of a checkpoint, a graft, or a mixture of two models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from typing_extensions import Self


class ModelSource(ABC):
    """Tensors under the names of a checkpoint on disk, each made when it is asked for.

    A source may hold threads and a temporary folder: it is used in a `with` block, or closed.

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
    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors names it, such as ``"BF16"``.

        Args:
            name: one of `names`.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Args:
            name: one of `names`.
        """

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A new tensor on the CPU, in the dtype and with the bits that it would have on disk.

        Several threads may call it at once.

        Args:
            name: one of `names`.

        Raises:
            DiffxferError: if an input cannot be read or has changed.
        """

    def close(self) -> None:  # noqa: B027 most sources hold nothing
        """Free what the source holds; it cannot be used any more."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
