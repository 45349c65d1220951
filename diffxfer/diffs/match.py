"""Matching: which tensor of which role belongs to which, or why it does not.

Two steps, as the diff vector stands between them: `match_base` pairs finetuned with base and gives
the differences that there are; `match_target` pairs those with the target. Both work on the keys
on disk. Nothing is passed over in silence: what fits nowhere is a `Problem`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import FLOATS
from diffxfer.diffs.names import pair_names, pattern
from diffxfer.errors import Culprits, MatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.diffs.selection import Selection

_NAMED_IN_MESSAGE = 3


@dataclass(frozen=True, slots=True)
class Side:
    """One role's tensors, as far as matching is concerned.

    Attributes:
        role: what it is.
        tensors: by name.
        vocabulary: the names whose rows belong to tokens.
    """

    role: str
    tensors: Mapping[str, TensorSpec]
    vocabulary: frozenset[str] = frozenset()


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
            ``"refused"``.
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
        left_out: finetuned's names that the user left out.
        fates: what became of tensors that are not among the differences.
        problems: what fits nowhere.
    """

    differences: list[Difference] = field(default_factory=list)
    integers: list[tuple[TensorSpec, TensorSpec]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class TargetMatch:
    """What `match_target` found.

    Attributes:
        grafts: the differences, each with the tensor of the target that it is added to.
        copies: the target's other tensors.
        fates: what became of every tensor.
        problems: what fits nowhere.
    """

    grafts: list[tuple[Difference, TensorSpec]] = field(default_factory=list)
    copies: list[TensorSpec] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


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
            match.left_out.append(name)
        elif name not in pairs:
            _missing(match, ours, "base", selection, label(name))
        else:
            _pair_with_base(match, ours, base.tensors[pairs[name]], name, finetuned, base)
    for name in base.tensors.keys() - set(pairs.values()):
        if selection.selects(label(name)):
            _missing(match, base.tensors[name], "finetuned", selection, label(name))
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
                "another shape",
            )
        )
    else:
        match.integers.append((ours, theirs))


def match_target(
    differences: Iterable[Difference],
    target: Side,
    selection: Selection,
    *,
    without_difference: Collection[str] = (),
) -> TargetMatch:
    """Pair differences with the target's tensors.

    Args:
        differences: Δ, tensor by tensor.
        target: what it is to be grafted on.
        selection: what the user chose, by the target's names.
        without_difference: finetuned's names that are known and have no Δ: integers, and what
            the user left out when the diff vector was extracted.

    Returns:
        Every tensor's place.

    Raises:
        MatchError: if names can be paired in two ways.
    """
    match = TargetMatch()
    by_name = {difference.name: difference for difference in differences}
    known = {*by_name, *without_difference}
    pairs = pair_names(target.tensors.keys(), known, ("the target", "finetuned"))
    for name, spec in target.tensors.items():
        source = by_name.get(pairs.get(name, ""))
        if not selection.selects(name):
            _copy(match, spec, "left out")
        elif spec.dtype not in FLOATS:
            _copy_integer(match, spec, source, known=name in pairs, selection=selection)
        elif source is not None:
            _graft(match, source, spec, target, selection)
        elif name in pairs:
            _copy(match, spec, "no part of the diff vector")
        elif selection.may_be_missing(name):
            _copy(match, spec, "only the target has it")
        else:
            match.problems.append(
                Problem("finetuned", name, "nothing", _described(spec), "only the target has it")
            )
    for name in by_name.keys() - set(pairs.values()):
        if selection.selects(name):
            _missing(match, by_name[name].sources[0], "target", selection, name)
        else:
            elements = by_name[name].sources[0].elements
            match.fates.append(Fate("dropped", name, elements, "left out"))
    return match


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


def group_problems(problems: Iterable[Problem]) -> tuple[Culprits, ...]:
    """Put together what differs only in numbers: a layer's index, an expert's."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for problem in problems:
        key = (problem.role, pattern(problem.name), problem.found, problem.expected, problem.reason)
        groups[key].append(problem.name)
    return tuple(
        Culprits(role, shape_of_name, tuple(sorted(names)), found, expected, reason)
        for (role, shape_of_name, found, expected, reason), names in sorted(groups.items())
    )


def refusal(groups: tuple[Culprits, ...]) -> MatchError:
    """The error for tensors that fit nowhere, in one line.

    Args:
        groups: at least one.
    """
    total = sum(len(group.names) for group in groups)
    told = "; ".join(_told(group) for group in groups[:_NAMED_IN_MESSAGE])
    more = len(groups) - _NAMED_IN_MESSAGE
    if more > 0:
        told += f"; and {more} more kinds (all with --dry-run or --json)"
    noun = "tensor does not fit" if total == 1 else "tensors do not fit"
    return MatchError(groups, f"{total} {noun}: {told}", _remedy(groups))


def _told(group: Culprits) -> str:
    first = group.names[0]
    count = f" ({len(group.names)} such, as {group.pattern})" if len(group.names) > 1 else ""
    if group.found == "nothing":
        return f"{first}{count} {group.expected} is missing in {group.role}"
    return f"{first}{count} is {group.found} in {group.role} and {group.expected}"


def _remedy(groups: tuple[Culprits, ...]) -> str:
    names = [group.names[0] for group in groups]
    fused = any(".experts.gate_up_proj" in name for name in names)
    single = any(".experts.0." in name or ".experts.*." in pattern(name) for name in names)
    if fused and single:
        return (
            "one role stores its experts fused and another one by one:"
            " save all roles with the same version of transformers"
        )
    if all(group.found == "nothing" for group in groups):
        return "check that these belong together, or name them in --allow-missing 'REGEX'"
    return "check that these belong together, or leave them out with --exclude 'REGEX'"
