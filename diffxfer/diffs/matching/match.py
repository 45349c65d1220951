"""Matching: which tensor of which role belongs to which, or why it does not.

Two steps, as the diff vector stands between them: `match_base` pairs finetuned with base and gives
the differences that there are; `match_target` pairs those with the target. Both work on the keys
on disk. Nothing is passed over in silence: what fits nowhere is a `Problem`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import FLOATS
from diffxfer.diffs.matching.names import pair_names

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.diffs.matching.selection import Selection


LEFT_OUT = "left out"
"""The fate of what the user chose not to take, and the reason where that is copied or dropped."""


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
        kind: ``"grafted"``, ``"copied"``, ``"dropped"``, ``"extracted"``, ``"kept"`` or
            ``"left out"``.
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


@dataclass(slots=True)
class BaseMatch:
    """What `match_base` found.

    Attributes:
        differences: Δ, tensor by tensor.
        integers: (finetuned, base) pairs that are no part of Δ and must be equal.
        kept: finetuned's names of tensors that are integers, and so have no difference.
        left_out: finetuned's tensors that the user left out, and how many elements they have.
        fates: what became of tensors that are not among the differences.
        problems: what fits nowhere.
    """

    differences: list[Difference] = field(default_factory=list)
    integers: list[tuple[TensorSpec, TensorSpec]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class TargetMatch:
    """What `match_target` found.

    Attributes:
        grafts: the differences, each with the tensor of the target that it is added to.
        copies: the target's other tensors.
        ambiguous: the names of the target whose rows may belong to tokens.
        fates: what became of every tensor.
        problems: what fits nowhere.
    """

    grafts: list[tuple[Difference, TensorSpec]] = field(default_factory=list)
    copies: list[TensorSpec] = field(default_factory=list)
    ambiguous: frozenset[str] = frozenset()
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def scaled(self, selection: Selection) -> list[tuple[Difference, TensorSpec]]:
        """The grafts whose scale is not 0.

        Args:
            selection: has the scales.
        """
        return [pair for pair in self.grafts if selection.alpha_of(pair[1].name) != 0]


def match_base(
    finetuned: Side, base: Side, selection: Selection, label: Callable[[str], str]
) -> BaseMatch:
    """Pair finetuned's tensors with base's.

    Args:
        finetuned: one role.
        base: the other.
        selection: what the user chose.
        label: the name that the selection knows a tensor of either role by.

    Returns:
        The differences and the rest.

    Raises:
        MatchError: if names can be paired in two ways.
    """
    match = BaseMatch()
    pairs = pair_names(finetuned.tensors.keys(), base.tensors.keys(), ("finetuned", "base"))
    for name, ours in finetuned.tensors.items():
        if not selection.selects(label(name)):
            match.left_out[name] = ours.elements
        elif name not in pairs:
            _missing(match, ours, "base", selection, label(name))
        else:
            _pair_with_base(match, ours, base.tensors[pairs[name]], name, finetuned, base)
    for name in base.tensors.keys() - set(pairs.values()):
        spec = base.tensors[name]
        if selection.selects(label(name)):
            _missing(match, spec, "finetuned", selection, label(name))
        else:
            match.fates.append(Fate("dropped", name, spec.elements, LEFT_OUT))
    return match


def _missing(
    match: BaseMatch | TargetMatch, spec: TensorSpec, role: str, selection: Selection, label: str
) -> None:
    if selection.may_be_missing(label):
        match.fates.append(Fate("dropped", spec.name, spec.elements, f"{role} has none"))
    else:
        expected = _described(spec)
        match.problems.append(Problem(role, label, "nothing", expected, f"missing in {role}"))


def _pair_with_base(
    match: BaseMatch, ours: TensorSpec, theirs: TensorSpec, name: str, finetuned: Side, base: Side
) -> None:
    vocabulary = name in finetuned.vocabulary or theirs.name in base.vocabulary
    floats = ours.dtype in FLOATS, theirs.dtype in FLOATS
    if not _shapes_fit(ours, theirs, vocabulary=vocabulary) or floats[0] != floats[1]:
        reason = "another shape" if floats[0] == floats[1] else "another kind of dtype"
        match.problems.append(
            Problem("finetuned", name, _described(ours), f"{_described(theirs)} in base", reason)
        )
    elif floats[0]:
        match.differences.append(Difference(name, (ours, theirs), vocabulary))
    elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        match.problems.append(
            Problem(
                "finetuned",
                name,
                _described(ours),
                f"{_described(theirs)} in base",
                "another shape" if ours.dtype == theirs.dtype else "another dtype",
            )
        )
    else:
        match.integers.append((ours, theirs))
        match.kept.append(name)


def match_target(
    differences: Iterable[Difference],
    target: Side,
    selection: Selection,
    *,
    kept: Collection[str] = (),
    left_out: Mapping[str, int] | None = None,
) -> TargetMatch:
    """Pair differences with the target's tensors.

    Args:
        differences: Δ, tensor by tensor.
        target: what it is to be grafted on.
        selection: what the user chose, by the target's names.
        kept: finetuned's names of integers, which have no Δ.
        left_out: what the user left out of finetuned, and how many elements it has; 0 where a
            diff vector does not tell.

    Returns:
        Every tensor's place.

    Raises:
        MatchError: if names can be paired in two ways.
    """
    match = TargetMatch(ambiguous=target.ambiguous)
    by_name = {difference.name: difference for difference in differences}
    kept, left_out = frozenset(kept), left_out or {}
    known = {*by_name, *kept, *left_out}
    pairs = pair_names(target.tensors.keys(), known, ("the target", "finetuned"))
    for name, spec in target.tensors.items():
        source = by_name.get(pairs.get(name, ""))
        if not selection.selects(name):
            _copy(match, spec, LEFT_OUT)
        elif spec.dtype not in FLOATS:
            _copy_integer(match, spec, source, known=name in pairs, selection=selection)
        elif source is not None:
            _graft(match, source, spec, target, selection)
        elif pairs.get(name) in kept:
            expected = "an integer tensor in finetuned"
            problem = Problem("target", name, _described(spec), expected, "another kind of dtype")
            match.problems.append(problem)
        elif name in pairs:
            _copy(match, spec, "no part of the diff vector")
        elif selection.may_be_missing(name):
            _copy(match, spec, "only the target has it")
        else:
            match.problems.append(
                Problem("finetuned", name, "nothing", _described(spec), "only the target has it")
            )
    for name in known - set(pairs.values()):
        difference = by_name.get(name)
        if name in left_out or not selection.selects(name):
            elements = difference.sources[0].elements if difference else left_out.get(name, 0)
            match.fates.append(Fate("dropped", name, elements, LEFT_OUT))
        elif difference is not None:
            _missing(match, difference.sources[0], "target", selection, name)
        else:
            _missing_integer(match, name, selection)
    return match


def _missing_integer(match: TargetMatch, name: str, selection: Selection) -> None:
    if selection.may_be_missing(name):
        match.fates.append(Fate("dropped", name, 0, "target has none"))
    else:
        problem = Problem("target", name, "nothing", "an integer tensor", "missing in target")
        match.problems.append(problem)


def _copy(match: TargetMatch, spec: TensorSpec, why: str) -> None:
    match.copies.append(spec)
    match.fates.append(Fate("copied", spec.name, spec.elements, why))


def _copy_integer(
    match: TargetMatch,
    spec: TensorSpec,
    source: Difference | None,
    *,
    known: bool,
    selection: Selection,
) -> None:
    if source is not None:
        expected = f"{_described(source.sources[0])} in finetuned"
        match.problems.append(
            Problem("target", spec.name, _described(spec), expected, "another kind of dtype")
        )
    elif known or selection.may_be_missing(spec.name):
        _copy(match, spec, f"{spec.dtype} is no part of a diff vector")
    else:
        match.problems.append(
            Problem("finetuned", spec.name, "nothing", _described(spec), "only the target has it")
        )


def _graft(
    match: TargetMatch, source: Difference, spec: TensorSpec, target: Side, selection: Selection
) -> None:
    vocabulary = source.vocabulary or spec.name in target.vocabulary
    ours = source.sources[0]
    if not _shapes_fit(ours, spec, vocabulary=vocabulary):
        expected = f"{_described(ours)} in finetuned"
        match.problems.append(
            Problem("target", spec.name, _described(spec), expected, "another shape")
        )
        return
    if vocabulary != source.vocabulary:
        source = Difference(source.name, source.sources, vocabulary)
    match.grafts.append((source, spec))
    alpha = selection.alpha_of(spec.name)
    kind, why = ("grafted", "") if alpha != 0 else ("copied", "alpha is 0")
    if alpha not in (0, selection.alpha):
        why = f"alpha is {alpha:g}"
    match.fates.append(Fate(kind, spec.name, spec.elements, why))


def _shapes_fit(one: TensorSpec, other: TensorSpec, *, vocabulary: bool) -> bool:
    if vocabulary and one.shape and other.shape:
        return one.shape[1:] == other.shape[1:]
    return one.shape == other.shape


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} {tuple(spec.shape)}"
