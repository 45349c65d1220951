"""What matching finds: which tensor of which role belongs to which, or why it does not.

There are two steps, since the diff vector stands between them: `with_base` pairs finetuned with
base and gives the differences that there are; `with_target` pairs those with the target. Both work
on names and shapes. Nothing is passed over in silence: what fits nowhere is a `Problem`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.diffs.matching.selection import Selection


LEFT_OUT = "left out"
"""The fate of what the user chose not to take, and the reason where that is copied or dropped."""
ADDED = "only finetuned has it"
"""Why what fine-tuning added is brought, or dropped."""
BUFFER = "a buffer, no weight"
REPLACED = "replaced by what finetuned brings"
OWN_HEAD = "only the target has this head"
IN_BASE = "only base has it"
OUTSIDE = "outside of the part that finetuned and base share"
COPY = "a copy of "
"""How the reason begins where a tensor is stored several times, and another role has it once."""
NO_LOSS = (LEFT_OUT, ADDED, BUFFER, IN_BASE, OUTSIDE, REPLACED)
"""Reasons to drop a tensor that the user gave, or is told of in a line of its own."""


@dataclass(frozen=True, slots=True)
class Side:
    """One role's tensors, as far as matching is concerned.

    Attributes:
        role: what it is.
        tensors: by name.
        vocabulary: the names whose rows belong to tokens.
        ambiguous: the names whose rows may belong to tokens.
    """

    role: str
    tensors: Mapping[str, TensorSpec]
    vocabulary: frozenset[str] = frozenset()
    ambiguous: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of Δ, still to be computed or as a diff vector has it.

    Attributes:
        name: its name in the diff vector: finetuned's.
        sources: (finetuned, base), or (diff vector,).
        vocabulary: whether its rows belong to tokens.
    """

    name: str
    sources: tuple[TensorSpec, ...]
    vocabulary: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape: finetuned's."""
        return self.sources[0].shape


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a tensor, for the table that a user sees.

    Attributes:
        kind: ``"grafted"``, ``"brought"``, ``"copied"``, ``"dropped"``, ``"extracted"``,
            ``"kept"`` or ``"left out"``.
        name: its name.
        elements: how many it has.
        why: the reason, empty where it is the ordinary one.
    """

    kind: str
    name: str
    elements: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A tensor that fits nowhere; see `errors.Culprits` for the fields."""

    role: str
    name: str
    found: str
    expected: str
    reason: str
    holders: tuple[str, ...] = ()
    addable: bool = False


@dataclass(slots=True)
class BaseMatch:
    """What `match_base` found.

    Attributes:
        differences: Δ, tensor by tensor.
        integers: (finetuned, base) pairs that are no part of Δ and must be equal.
        kept: finetuned's names of tensors that are integers, and so have no difference.
        left_out: finetuned's tensors that the user left out, and how many elements they have.
        added: finetuned's tensors that are carried over whole.
        is_part: whether one of finetuned and base is a part of the other, so that the target may
            have more too.
        excuses_heads: whether base and target may have a head that finetuned has not, since
            finetuned has another one.
        keeps_words: whether that does not hold for the head for words, since finetuned has one.
        in_base: base's tensors outside of a part, or of a head that finetuned has not, and how many
            elements they have: a target's are copied or replaced.
        fates: what became of tensors that are not among the differences.
        problems: what fits nowhere.
    """

    differences: list[Difference] = field(default_factory=list)
    integers: list[tuple[TensorSpec, TensorSpec]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    added: list[TensorSpec] = field(default_factory=list)
    is_part: bool = False
    excuses_heads: bool = False
    keeps_words: bool = False
    in_base: dict[str, int] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class TargetMatch:
    """What `match_target` found.

    Attributes:
        grafts: the differences, each with the tensor of the target that it is added to.
        copies: the target's other tensors.
        shared: the target's tensors that are copies of another one, and which.
        replaced: the names of the target's tensors whose place finetuned's take.
        named: the target's names of tensors that finetuned brings, where it has some of its own.
        ambiguous: the names of the target whose rows may belong to tokens.
        fates: what became of every tensor.
        problems: what fits nowhere.
    """

    grafts: list[tuple[Difference, TensorSpec]] = field(default_factory=list)
    copies: list[TensorSpec] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    ambiguous: frozenset[str] = frozenset()
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def scaled(self, selection: Selection) -> list[tuple[Difference, TensorSpec]]:
        """The grafts whose scale is not 0.

        Args:
            selection: has the scales.
        """
        return [pair for pair in self.grafts if selection.alpha_of(pair[1].name) != 0]


def shapes_fit(one: TensorSpec, other: TensorSpec, *, vocabulary: bool) -> bool:
    """Whether two tensors have the same shape, or rows that tokens may pair.

    Args:
        one: a tensor.
        other: another one.
        vocabulary: whether their rows belong to tokens.
    """
    if vocabulary and one.shape and other.shape:
        return one.shape[1:] == other.shape[1:]
    return one.shape == other.shape


def described(spec: TensorSpec) -> str:
    """A tensor's dtype and shape, for messages."""
    return f"{spec.dtype} {tuple(spec.shape)}"


def in_only(holders: tuple[str, ...]) -> str:
    """Who has a tensor that another role lacks, in words.

    Args:
        holders: the roles.
    """
    named = ["the diff vector" if holder == "diff vector" else holder for holder in holders]
    return f"in {' and '.join(named)} only"
