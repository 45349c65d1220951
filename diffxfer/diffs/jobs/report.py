"""The report that a verb returns to its caller."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.artifact.distances import distances_as_json
from diffxfer.diffs.matching.match import (
    ADDED,
    BUFFER,
    COPY,
    IN_BASE,
    NO_LOSS,
    OUTSIDE,
    OWN_HEAD,
    REPLACED,
)
from diffxfer.diffs.matching.names import pattern
from diffxfer.errors import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from diffxfer.diffs.artifact.distances import Distance
    from diffxfer.diffs.matching.match import Fate
    from diffxfer.diffs.relations.relatedness import Relation
    from diffxfer.errors import Culprits


@dataclass(frozen=True, slots=True)
class FateGroup:
    """Tensors with the same fate whose names differ only in numbers.

    Attributes:
        kind: ``"grafted"``, ``"moved"``, ``"brought"``, ``"copied"``, ``"dropped"``,
            ``"extracted"``, ``"kept"`` or ``"left out"``.
        pattern: their names with every number replaced by ``*``.
        tensors: how many.
        parameters: how many elements they have in all.
        why: the reason, empty in the ordinary case.
    """

    kind: str
    pattern: str
    tensors: int
    parameters: int
    why: str


@dataclass(frozen=True, slots=True)
class StoredError:
    """How far a quantised tensor of the graft is from the exact one.

    Attributes:
        name: the tensor.
        change: ‖exact graft − target‖: ‖α·Δ‖.
        error: ‖stored graft − exact graft‖.
    """

    name: str
    change: float
    error: float

    @property
    def ratio(self) -> float:
        """Error / change; infinite if only the change is zero."""
        if self.change:
            return self.error / self.change
        return math.inf if self.error else 0.0

    def as_json(self) -> dict[str, Any]:
        """The fields and the ratio as JSON values; infinity becomes null."""
        ratio = self.ratio if math.isfinite(self.ratio) else None
        return {"name": self.name, "change": self.change, "error": self.error, "ratio": ratio}


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, or with `dry_run` what would be done.

    Attributes:
        command: ``"extract"``, ``"apply"``, ``"transfer"`` or ``"tune"``.
        output: the folder.
        written: whether the folder was written.
        tensors: number of tensors by fate: grafted, moved, brought, copied, dropped,
            extracted, kept, left out, refused.
        parameters: number of elements by fate.
        plan: the fates, grouped.
        refused: tensors that cannot be matched; empty unless it was a dry run.
        bytes_to_read: bytes of the tensors to read.
        bytes_to_write: bytes of the shards to write.
        bytes_to_fetch: bytes of models on the Hub that were not cached when the run began.
        resumed_bytes: bytes read and written by an earlier run that this one resumed.
        free_bytes: free space on the output's disk before the run.
        elapsed_s: seconds from the call to the result.
        device: where the arithmetic ran, or would run.
        device_why: why that device was chosen, if diffxfer chose it.
        vocabulary: how rows of tokens were paired: ``"ids"``, ``"tokens"`` or ``"rows"``.
        added_tokens: tokens that finetuned added and the output now has.
        dropped_tokens: tokens whose difference was dropped.
        inexact: number of elements of finetuned, by tensor, that base + Δ does not give back.
        left_out: files of the inputs that the output does not have.
        relations: how the compared models relate, by sampled elements.
        warnings: one line each.
        notes: remarks on unusual tensors and on names; one line each.
        requantized: how far each tensor that was quantised anew is from the exact graft.
        unpacked_bytes: for a packed diff vector, the size of the plain one that is rounded to
            finetuned's dtypes.
        packed_estimate: at most how many bytes a diff vector takes if it is packed, estimated
            from a sample; None for one that was packed.
        lossy: for a diff vector packed with a loss, the error of each tensor.
    """

    command: str
    output: Path
    written: bool
    tensors: dict[str, int]
    parameters: dict[str, int]
    plan: tuple[FateGroup, ...]
    refused: tuple[Culprits, ...]
    bytes_to_read: int
    bytes_to_write: int
    bytes_to_fetch: int
    resumed_bytes: int
    free_bytes: int
    elapsed_s: float
    device: str
    device_why: str
    vocabulary: str
    added_tokens: tuple[str, ...]
    dropped_tokens: tuple[str, ...]
    inexact: dict[str, int]
    left_out: tuple[str, ...]
    relations: tuple[Relation, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    requantized: tuple[StoredError, ...] = ()
    unpacked_bytes: int | None = None
    packed_estimate: int | None = None
    lossy: tuple[Distance, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        from dataclasses import asdict

        errors = [error.as_json() for error in self.requantized]
        lossy = distances_as_json(self.lossy) if self.lossy else None
        more = {"output": str(self.output), "requantized": errors, "lossy": lossy}
        return {**asdict(self), **more}


_ORDER = (
    *("tuned", "grafted", "moved", "extracted", "brought"),
    *("copied", "kept", "dropped", "left out"),
)
"""The kinds of fates in the order in which a user sees them."""


def group_fates(fates: Iterable[Fate]) -> tuple[FateGroup, ...]:
    """Group fates whose names differ only in numbers, in the order of their kinds."""
    tensors: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    for fate in fates:
        key = fate.kind, pattern(fate.name), fate.why
        tensors[key] += 1
        parameters[key] += fate.elements
    return tuple(
        FateGroup(kind, name, tensors[kind, name, why], parameters[kind, name, why], why)
        for kind, name, why in sorted(tensors, key=lambda key: (_ORDER.index(key[0]), key[1:]))
    )


def count_fates(groups: Iterable[FateGroup]) -> tuple[dict[str, int], dict[str, int]]:
    """Tensors and parameters by fate."""
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for group in groups:
        tensors[group.kind] += group.tensors
        parameters[group.kind] += group.parameters
    return dict(tensors), dict(parameters)


def losses(fates: Iterable[Fate], dropped_tokens: Sequence[str]) -> list[str]:
    """Warnings of tokens and tensors that do not reach the output, one line each.

    Args:
        fates: the fate of every tensor.
        dropped_tokens: tokens whose difference is dropped.
    """
    lost = {
        "tokens that the target lacks, whose difference is dropped": dropped_tokens,
        "tensors dropped because of --allow-missing": [
            fate.name
            for fate in fates
            if fate.kind == "dropped" and fate.why not in NO_LOSS and not fate.why.startswith(COPY)
        ],
    }
    return [f"{what}: {listed(names)}" for what, names in lost.items() if names]


def remarks(fates: Sequence[Fate]) -> list[str]:
    """Remarks on the fates of unusual tensors, one line per kind.

    Args:
        fates: the fate of every tensor.
    """
    found = {
        (kind, why): [fate.name for fate in fates if (fate.kind, fate.why) == (kind, why)]
        for kind, why in _TOLD
    }
    lines = [f"{_TOLD[key]}: {_counted(names)}" for key, names in found.items() if names]
    copies = [fate.name for fate in fates if fate.why.startswith(COPY)]
    if copies:
        lines.append(f"one tensor stored under several names: {_counted(copies)}")
    return lines


_TOLD = {
    ("copied", BUFFER): "buffers copied from the target, since they are not weights",
    ("dropped", BUFFER): "buffers left out, since they are not weights",
    (
        "copied",
        OUTSIDE,
    ): "copied from the target, since they are outside the part that finetuned and base share",
    ("dropped", IN_BASE): "only in base, so they have no difference",
    ("copied", OWN_HEAD): "copied from the target, since finetuned does not have this head",
    (
        "dropped",
        OUTSIDE,
    ): "only in finetuned, outside the part that it shares with base, and left out",
    ("brought", ADDED): "brought from finetuned, whole and unscaled",
    ("dropped", ADDED): "added by fine-tuning, and dropped because of --added drop",
    ("dropped", REPLACED): "replaced by the added tensors of finetuned",
}


def _counted(names: Sequence[str]) -> str:
    count = f"{len(names):,} tensors" if len(names) > 1 else "1 tensor"
    return f"{count} ({listed(names)})"
