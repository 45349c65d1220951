"""What an adapter in the making stores, and what is said of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_WEIGHTS
from diffxfer.checkpoints.stored import BITS
from diffxfer.diffs.artifact.manifest import FactorEntry
from diffxfer.diffs.lora.peft_config import Stored
from diffxfer.diffs.matching.match import UNCHANGED, Fate
from diffxfer.streaming.plan import Operation, Run, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.lora.held import Held, Holder
    from diffxfer.diffs.lora.options import LoraOptions
    from diffxfer.diffs.lora.parts import Part

PREFIX = "base_model.model."
"""The beginning of every name in an adapter."""


@dataclass(slots=True, kw_only=True)
class AdapterOutput:
    """What an adapter in the making stores, and what is said of it.

    Attributes:
        options: what the adapter is like.
        holder: holds factors until the job is run.
        stored: what the adapter stores, for its config.
        tasks: one for each tensor of the adapter.
        fates: the fates of the tensors of Δ.
        entries: what the adapter keeps of each tensor of Δ.
    """

    options: LoraOptions
    holder: Holder
    stored: Stored = field(default_factory=Stored)
    tasks: list[TensorTask] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    entries: dict[str, FactorEntry] = field(default_factory=dict)

    def extracted(self, part: Part) -> None:
        """Note that factors have the Δ of a part.

        Args:
            part: the part.
        """
        self.fates.append(Fate("extracted", part.name, part.elements))

    def leave(self, part: Part) -> None:
        """Note that a part has no Δ.

        Args:
            part: the part.
        """
        self.fates.append(Fate("left out", part.name, part.elements, UNCHANGED))

    def write_factor(self, name: str, held: Held, part: Part) -> None:
        """Write a factor.

        Args:
            name: its name in the model.
            held: its values.
            part: a part that it has the Δ of.
        """
        named = replace(held, name=PREFIX + name)
        self.write(named.name, named, whole(RunKind.COPY, 1), held.shape, self.dtype(part))

    def write(
        self,
        name: str,
        inputs: StoredTensor | tuple[StoredTensor, ...],
        runs: tuple[Run, ...],
        shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        """Write a tensor.

        Args:
            name: its name in the adapter.
            inputs: where its values come from.
            runs: how its rows are computed.
            shape: its shape.
            dtype: its dtype.
        """
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        task = TensorTask(
            name=name,
            operation=Operation.BRING,
            inputs=given,
            dtype=dtype,
            shape=shape,
            runs=runs,
            shard=ADAPTER_WEIGHTS,
        )
        self.tasks.append(task)

    def entry(
        self, part: Part, rank: int, squares: float, kept: float, elements: int
    ) -> FactorEntry:
        """What the adapter keeps of a part.

        Args:
            part: the part.
            rank: the rank of its factors.
            squares: the sum of squares of its Δ.
            kept: the share of it that is kept.
            elements: the number of elements in the adapter.
        """
        size = BITS[self.dtype(part)] // 8
        return FactorEntry(
            form=part.form.value,
            rank=rank,
            kept=kept,
            delta_norm=math.sqrt(squares),
            bytes=elements * size,
            full_bytes=part.elements * size,
        )

    def dtype(self, part: Part) -> str:
        """The dtype of a part in the adapter.

        Args:
            part: the part.
        """
        return self.options.dtype or part.difference.sources[0].dtype
