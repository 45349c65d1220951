"""What an encoding is. Each one is a module beside this; `recognise` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from diffxfer.checkpoints.stored import StoredTensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Encoding:
    """A way to store tensors other than as plain arrays.

    Attributes:
        format: the name that users know, such as ``"fp8 with block scales"``.
        find: finds the tensors that are stored in this way, given the checkpoint's config and its
            tensors on disk. It raises a `CheckpointError` if a part is missing or has a wrong
            shape or dtype.
        methods: the values of ``quant_method`` in configs of checkpoints that are stored so; empty
            if configs do not tell.
    """

    format: str
    find: Callable[[Mapping[str, Any], Mapping[str, TensorSpec]], Iterable[StoredTensor]]
    methods: tuple[str, ...] = ()
