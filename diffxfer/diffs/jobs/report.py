"""What a verb tells its caller."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from diffxfer.diffs.matching.match import Fate
    from diffxfer.diffs.relations.relatedness import Relation
    from diffxfer.errors import Culprits


_LISTED = 5


@dataclass(frozen=True, slots=True)
class FateGroup:
    """Tensors of one fate whose names differ only in numbers.

    Attributes:
        kind: ``"grafted"``, ``"brought"``, ``"copied"``, ``"dropped"``, ``"extracted"``,
            ``"kept"`` or ``"left out"``.
        pattern: their names with every number replaced by ``*``.
        tensors: how many.
        parameters: how many elements they have in all.
        why: the reason, empty where it is the ordinary one.
    """

    kind: str
    pattern: str
    tensors: int
    parameters: int
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, or with `dry_run` what would be.

    Attributes:
        command: ``"extract"``, ``"apply"``, ``"transfer"`` or ``"tune"``.
        output: the folder.
        written: whether it is there now.
        tensors: how many tensors had each fate: grafted, brought, copied, dropped, extracted,
            kept, left out, refused.
        parameters: how many elements those have.
        plan: the fates, grouped.
        refused: tensors that fit nowhere; only a dry run gets this far with any.
        bytes_to_read: of tensors.
        bytes_to_write: of shards.
        bytes_to_fetch: of models on the Hub, what was not in its cache when the run began.
        resumed_bytes: of both, what an earlier run had done and this one did not do again.
        free_bytes: on the output's disk, before.
        elapsed_s: seconds from the call to the result.
        device: where the arithmetic ran, or would.
        device_why: the reason, where that was left to be decided.
        vocabulary: how rows of tokens were paired: ``"ids"``, ``"tokens"`` or ``"rows"``.
        added_tokens: tokens that finetuned added and the output has now.
        dropped_tokens: tokens whose difference was dropped.
        inexact: by tensor, the elements of finetuned that base and Δ do not give back exactly.
        left_out: files of the inputs that the output does not have.
        relations: how the models relate that were compared, by sampled elements.
        warnings: one line each.
        notes: what became of tensors that are no ordinary ones, and of names; one line each.
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

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        from dataclasses import asdict

        return {**asdict(self), "output": str(self.output)}


def group_fates(fates: Iterable[Fate]) -> tuple[FateGroup, ...]:
    """Put together fates that differ only in numbers within names, in the order of their kinds."""
    tensors: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    for fate in fates:
        key = fate.kind, pattern(fate.name), fate.why
        tensors[key] += 1
        parameters[key] += fate.elements
    order = ("tuned", "grafted", "extracted", "brought", "copied", "kept", "dropped", "left out")
    return tuple(
        FateGroup(kind, name, tensors[kind, name, why], parameters[kind, name, why], why)
        for kind, name, why in sorted(tensors, key=lambda key: (order.index(key[0]), key[1:]))
    )


def count_fates(groups: Iterable[FateGroup]) -> tuple[dict[str, int], dict[str, int]]:
    """Tensors and parameters by fate."""
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for group in groups:
        tensors[group.kind] += group.tensors
        parameters[group.kind] += group.parameters
    return dict(tensors), dict(parameters)


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def losses(fates: Iterable[Fate], dropped_tokens: Sequence[str]) -> list[str]:
    """What does not reach the output, for a user who allowed it or could not know.

    Args:
        fates: what becomes of every tensor.
        dropped_tokens: tokens whose difference is dropped.
    """
    lost = {
        "tokens without a place in the target, whose difference is dropped": dropped_tokens,
        "tensors dropped, as --allow-missing has it": [
            fate.name
            for fate in fates
            if fate.kind == "dropped" and fate.why not in NO_LOSS and not fate.why.startswith(COPY)
        ],
    }
    return [f"{what}: {listed(names)}" for what, names in lost.items() if names]


def remarks(fates: Sequence[Fate]) -> list[str]:
    """What became of tensors that are no ordinary weights, a line for each kind.

    Args:
        fates: what becomes of every tensor.
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
    ("copied", BUFFER): "buffers kept as the target has them, since they are no weights",
    ("dropped", BUFFER): "buffers that are left out, since they are no weights",
    ("copied", OUTSIDE): "copied from the target, since they lie outside of the part that finetuned"
    " and base share",
    ("dropped", IN_BASE): "in base only, so that there is no difference",
    ("copied", OWN_HEAD): "copied from the target, whose head finetuned does not have",
    ("dropped", OUTSIDE): "in finetuned only, outside of the part that it shares with base, and"
    " left out",
    ("brought", ADDED): "brought from finetuned, whole and unscaled",
    ("dropped", ADDED): "added by fine-tuning and dropped, as --added drop says",
    ("dropped", REPLACED): "replaced by what finetuned brings",
}


def _counted(names: Sequence[str]) -> str:
    count = f"{len(names):,} tensors" if len(names) > 1 else "1 tensor"
    return f"{count} ({listed(names)})"
