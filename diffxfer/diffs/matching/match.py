"""The results of matching: which tensors of the roles belong together, or why one does not match.

There are two steps, with the diff vector between them: `with_base` pairs finetuned with base and
gives the differences; `with_target` pairs the differences with the target. Both use names and
shapes. No tensor is ignored silently: one that cannot be matched is a `Problem`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.matching.selection import Selection


LEFT_OUT = "left out"
"""The fate of tensors that the user left out, and the reason if they are copied or dropped."""
ADDED = "only finetuned has it"
"""The reason why a tensor that fine-tuning added is brought or dropped."""
BUFFER = "a buffer, not a weight"
REPLACED = "replaced by the added tensors of finetuned"
OWN_HEAD = "only the target has this head"
IN_BASE = "only base has it"
UNCHANGED = "finetuned does not change it"
OUTSIDE = "outside the part that finetuned and base share"
COPY = "a copy of "
"""The beginning of the reason for a tensor that one role stores several times, another once."""
REST = "as --rest says"
"""The reason why an adapter does not store a tensor."""
NO_LOSS = (LEFT_OUT, ADDED, BUFFER, IN_BASE, OUTSIDE, REPLACED, UNCHANGED, REST)
"""Reasons to drop a tensor that need no warning: the user asked for it, or a note reports it."""


@dataclass(frozen=True, slots=True)
class Side:
    """One role's tensors, as matching sees them.

    Attributes:
        role: the role.
        tensors: its tensors by name.
        vocabulary: names of tensors whose rows belong to tokens.
        ambiguous: names of tensors whose rows may belong to tokens.
    """

    role: str
    tensors: Mapping[str, StoredTensor]
    vocabulary: frozenset[str] = frozenset()
    ambiguous: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of Δ, to be computed or read from a diff vector.

    Attributes:
        name: its name in the diff vector, which is finetuned's.
        sources: (finetuned, base), or (diff vector,).
        vocabulary: whether its rows belong to tokens.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    vocabulary: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, which is finetuned's."""
        return self.sources[0].shape


@dataclass(frozen=True, slots=True)
class Fate:
    """What happens to a tensor, for the table that the user sees.

    Attributes:
        kind: ``"grafted"``, ``"moved"``, ``"brought"``, ``"copied"``, ``"dropped"``,
            ``"extracted"``, ``"kept"`` or ``"left out"``.
        name: its name.
        elements: its number of elements.
        why: the reason, empty in the ordinary case.
    """

    kind: str
    name: str
    elements: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A tensor that cannot be matched; see `errors.Culprits` for the fields."""

    role: str
    name: str
    found: str
    expected: str
    reason: str
    holders: tuple[str, ...] = ()
    addable: bool = False


@dataclass(slots=True)
class BaseMatch:
    """The result of `match_base`.

    Attributes:
        differences: the tensors of Δ.
        integers: (finetuned, base) pairs of integer tensors; they are not in Δ and must be equal.
        kept: finetuned's names of integer tensors, which have no difference.
        left_out: finetuned's tensors that the user left out, with their numbers of elements.
        added: finetuned's tensors that are brought whole.
        is_part: whether finetuned is a part of base or the reverse, so that the target may have
            more tensors too.
        excuses_heads: whether base and target may have a head that finetuned lacks, because
            finetuned has a different one.
        keeps_words: whether `excuses_heads` excludes the language-model head, because finetuned
            has one.
        in_base: tensors that only base has, outside the shared part or in a head that finetuned
            lacks, with their numbers of elements; the target's are copied or replaced.
        unchanged: tensors that an adapter does not change, with their numbers of elements.
        fates: the fates of tensors that are not among the differences.
        problems: tensors that cannot be matched.
    """

    differences: list[Difference] = field(default_factory=list)
    integers: list[tuple[StoredTensor, StoredTensor]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    added: list[StoredTensor] = field(default_factory=list)
    is_part: bool = False
    excuses_heads: bool = False
    keeps_words: bool = False
    in_base: dict[str, int] = field(default_factory=dict)
    unchanged: dict[str, int] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class TargetMatch:
    """The result of `match_target`.

    Attributes:
        grafts: the differences, each with the target's tensor that it is added to.
        copies: the target's other tensors.
        shared: names of the target's tensors that are copies, each with the name of the original.
        replaced: names of the target's tensors that finetuned's replace.
        named: the target's names of tensors that finetuned brings, where it has such tensors.
        ambiguous: the target's names of tensors whose rows may belong to tokens.
        fates: the fate of every tensor.
        problems: tensors that cannot be matched.
    """

    grafts: list[tuple[Difference, StoredTensor]] = field(default_factory=list)
    copies: list[StoredTensor] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    ambiguous: frozenset[str] = frozenset()
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def scaled(self, selection: Selection) -> list[tuple[Difference, StoredTensor]]:
        """The grafts whose scale is not 0.

        Args:
            selection: the scales.
        """
        return [pair for pair in self.grafts if selection.alpha_of(pair[1].name) != 0]


def shapes_fit(one: StoredTensor, other: StoredTensor, *, vocabulary: bool) -> bool:
    """Whether two tensors have the same shape, or differ only in rows that are paired by token.

    Args:
        one: the first tensor.
        other: the second tensor.
        vocabulary: whether their rows belong to tokens.
    """
    if vocabulary and one.shape and other.shape:
        return one.shape[1:] == other.shape[1:]
    return one.shape == other.shape


def described(spec: StoredTensor) -> str:
    """A tensor's dtype and shape, for messages."""
    return f"{spec.dtype} {tuple(spec.shape)}"


def in_only(holders: tuple[str, ...]) -> str:
    """The reason that only these roles have a tensor, for messages.

    Args:
        holders: the roles.
    """
    named = ["the diff vector" if holder == "diff vector" else holder for holder in holders]
    return f"in {' and '.join(named)} only"
