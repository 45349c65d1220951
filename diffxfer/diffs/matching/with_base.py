"""Pairing finetuned with base: the differences, and the tensors that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.matching.added import find_added, find_replaced, known_heads
from diffxfer.diffs.matching.match import (
    ADDED,
    COPY,
    LEFT_OUT,
    OUTSIDE,
    BaseMatch,
    Difference,
    Fate,
    Problem,
    Side,
    described,
    shapes_fit,
)
from diffxfer.diffs.matching.parts import outside_part, pair_tensors
from diffxfer.diffs.matching.shared import share

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.matching.selection import Selection


def match_base(
    finetuned: Side,
    base: Side,
    selection: Selection,
    label: Callable[[str], str],
    added: str = "refuse",
    unchanged: Collection[str] = (),
    *,
    keeps_words: bool = False,
) -> BaseMatch:
    """Pair finetuned's tensors with base's.

    Args:
        finetuned: finetuned's tensors.
        base: base's tensors.
        selection: the tensors that the user selected.
        label: gives the name of a tensor that the selection's patterns are matched against.
        added: what to do with tensors that only finetuned has: ``"bring"``, ``"drop"`` or
            ``"refuse"``.
        unchanged: finetuned's tensors that are base's own, under the same names.
        keeps_words: whether finetuned has a language-model head, whatever it added.

    Returns:
        The differences and the rest.

    Raises:
        MatchError: if names can be paired in two ways, or copies of one tensor differ.
    """
    match = BaseMatch(keeps_words=keeps_words)
    pairs = pair_tensors(_shapes(finetuned), _shapes(base), ("finetuned", "base"))
    copies = share(_stored(finetuned), _stored(base), pairs, ("finetuned", "base"))
    taken = set(pairs.values())
    lonely = [name for name in finetuned.tensors if name not in pairs and name not in copies[0]]
    known = {*pairs, *(base.tensors.keys() - taken)}
    addable = find_added(lonely, pairs.keys(), known)
    outside = outside_part(pairs.keys(), lonely)
    match.is_part = bool(outside)
    outside -= known_heads(addable, pairs.keys(), lonely)
    for name, ours in finetuned.tensors.items():
        if name in copies[0]:
            match.fates.append(Fate("dropped", name, ours.elements, COPY + copies[0][name]))
        elif not selection.selects(label(name)):
            match.left_out[name] = ours.elements
        elif name in unchanged:
            match.unchanged[name] = ours.elements
        elif name in pairs:
            _pair(match, ours, base.tensors[pairs[name]], name, finetuned, base)
        elif selection.may_be_missing(label(name)):
            match.fates.append(Fate("dropped", name, ours.elements, "base has none"))
        elif name in outside:
            match.fates.append(Fate("dropped", name, ours.elements, OUTSIDE))
        elif name in addable and added != "refuse":
            _add(match, ours, added)
        else:
            _refuse(match, ours, "base", label(name), addable=name in addable)
    alone = [name for name in base.tensors if name not in taken and name not in copies[1]]
    _match_base_only(match, base, alone, taken, copies[1], selection, label)
    return match


def _match_base_only(
    match: BaseMatch,
    base: Side,
    alone: list[str],
    taken: set[str],
    copies: dict[str, str],
    selection: Selection,
    label: Callable[[str], str],
) -> None:
    """Sort the tensors that only base has: the rest of a whole model, or a different head."""
    outside = outside_part(taken, alone)
    match.is_part = match.is_part or bool(outside)
    heads = frozenset[str]()
    if match.excuses_heads:
        heads = find_replaced(alone, taken, keeps_words=match.keeps_words)
    for name, same in copies.items():
        match.fates.append(Fate("dropped", name, base.tensors[name].elements, COPY + same))
    for name in alone:
        spec = base.tensors[name]
        if not selection.selects(label(name)):
            match.fates.append(Fate("dropped", name, spec.elements, LEFT_OUT))
        elif selection.may_be_missing(label(name)):
            match.fates.append(Fate("dropped", name, spec.elements, "finetuned has none"))
        elif name in outside or name in heads:
            match.in_base[name] = spec.elements
        else:
            _refuse(match, spec, "finetuned", label(name))


def _shapes(side: Side) -> dict[str, tuple[int, ...] | None]:
    """Shapes for pairing; None for vocabulary tensors, whose row counts may differ."""
    return {
        name: None if name in side.vocabulary else spec.shape for name, spec in side.tensors.items()
    }


def _stored(side: Side) -> dict[str, tuple[StoredTensor, ...]]:
    return {name: (side.tensors[name],) for name in sorted(side.vocabulary)}


def _add(match: BaseMatch, spec: StoredTensor, added: str) -> None:
    match.excuses_heads = True
    if added == "bring":
        match.added.append(spec)
    else:
        match.fates.append(Fate("dropped", spec.name, spec.elements, ADDED))


def _refuse(
    match: BaseMatch, spec: StoredTensor, lacking: str, label: str, *, addable: bool = False
) -> None:
    holder = "base" if lacking == "finetuned" else "finetuned"
    match.problems.append(
        Problem(
            *(lacking, label, "nothing", described(spec), f"in {holder} only"), (holder,), addable
        )
    )


def _pair(
    match: BaseMatch,
    ours: StoredTensor,
    theirs: StoredTensor,
    name: str,
    finetuned: Side,
    base: Side,
) -> None:
    vocabulary = name in finetuned.vocabulary or theirs.name in base.vocabulary
    floats = ours.dtype in FLOATS, theirs.dtype in FLOATS
    expected = f"{described(theirs)} in base"
    if not shapes_fit(ours, theirs, vocabulary=vocabulary) or floats[0] != floats[1]:
        reason = "another shape" if floats[0] == floats[1] else "another kind of dtype"
        match.problems.append(Problem("finetuned", name, described(ours), expected, reason))
    elif floats[0]:
        match.differences.append(Difference(name, (ours, theirs), vocabulary))
    elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        reason = "another shape" if ours.dtype == theirs.dtype else "another dtype"
        match.problems.append(Problem("finetuned", name, described(ours), expected, reason))
    else:
        match.integers.append((ours, theirs))
        match.kept.append(name)
