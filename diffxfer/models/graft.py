"""The weights of a graft, as a source: computed tensor by tensor, never written."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import finalize

from diffxfer.checkpoints.resolve import find
from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.diffs.grafting.graft import plan_apply, plan_transfer
from diffxfer.diffs.grafting.in_memory import GraftInMemory
from diffxfer.diffs.grafting.options import check_weight_options
from diffxfer.models.source import ModelSource
from diffxfer.models.tensors import as_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from typing_extensions import Unpack

    from diffxfer.diffs.grafting.assembly import PlannedGraft
    from diffxfer.diffs.grafting.in_memory import FileInMemory
    from diffxfer.diffs.grafting.options import WeightOptions


class GraftSource(ModelSource):
    """The weights of a graft; its companions are in a temporary folder until it is closed.

    Attributes:
        warnings: what a user should know, as `apply_diff` reports it.
    """

    def __init__(self, label: str, plan: Callable[[Path], PlannedGraft], home: Path | None) -> None:
        self.label = label
        with ExitStack() as stack:
            scratch = stack.enter_context(scratch_folder(home))
            # The plan checks its output folder, which is this one.
            self.folder = scratch / "graft"
            planned = plan(self.folder)
            self.folder.mkdir()
            self._graft = GraftInMemory(planned, self.folder)
            stack.callback(self._graft.close)
            self._close = finalize(self, stack.pop_all().close)
        self.warnings = self._graft.warnings

    @property
    def files(self) -> tuple[FileInMemory, ...]:
        """The shards that would be written, sorted by name."""
        return self._graft.files

    def names(self) -> Iterator[str]:
        """The names of all tensors, in the order in which they would be stored."""
        return self._graft.names()

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors names it."""
        return self._graft.task(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._graft.task(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """A new tensor, with the bits that `apply_diff` or `transfer` would write."""
        return as_tensor(self._graft.make(name), self.dtype(name), self.shape(name))

    def close(self) -> None:
        """End its threads, and remove its folder."""
        self._close()


def graft_source(
    diff: Path | str,
    target: Path | str,
    alpha: float = 1.0,
    *,
    home: Path | None = None,
    **options: Unpack[WeightOptions],
) -> GraftSource:
    """The weights that `apply_diff` would write.

    Args:
        diff: a diff vector or an adapter: a folder, or one on the Hub.
        target: the checkpoint to graft onto, named the same way.
        alpha: the scale of Δ.
        home: where its temporary folder is made; None for the system's.
        options: the other options of `apply_diff` that decide the weights.

    Raises:
        DiffxferError: for every failure of `apply_diff` that is known before tensors are computed.
    """
    checked = check_weight_options(alpha, options, ("target",))

    def plan(out: Path) -> PlannedGraft:
        places = find(diff, "a diff vector"), find(target, "the target checkpoint")
        return plan_apply(places, out, checked)

    return GraftSource(f"{target} + {float(alpha)!r}·Δ", plan, home)


def transfer_source(
    finetuned: Path | str,
    base: Path | str,
    target: Path | str,
    alpha: float = 1.0,
    *,
    home: Path | None = None,
    **options: Unpack[WeightOptions],
) -> GraftSource:
    """The weights that `transfer` would write.

    Args:
        finetuned: the fine-tuned checkpoint: a folder, or a model on the Hub.
        base: the checkpoint that finetuned was trained from, named the same way.
        target: the checkpoint to graft onto, named the same way.
        alpha: the scale of Δ.
        home: where its temporary folder is made; None for the system's.
        options: the other options of `transfer` that decide the weights.

    Raises:
        DiffxferError: for every failure of `transfer` that is known before tensors are computed.
    """
    checked = check_weight_options(alpha, options, ("finetuned", "base", "target"))
    label = f"{target} + {float(alpha)!r}·({finetuned} − {base})"
    return GraftSource(
        label, lambda out: plan_transfer(finetuned, base, target, out, checked), home
    )
