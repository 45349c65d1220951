"""Pairing a source of Δ with the target's tensors, including its output head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffxfer.diffs.delta.from_checkpoints import HEAD
from diffxfer.diffs.matching.added import find_added_buffers
from diffxfer.diffs.matching.match import (
    ADDED,
    BUFFER,
    REPLACED,
    Fate,
    Problem,
    Side,
    described,
    in_only,
)
from diffxfer.diffs.matching.names import canonical, is_head
from diffxfer.diffs.matching.parts import pair_tensors
from diffxfer.diffs.matching.ties import (
    Head,
    HeadState,
    find_head,
    refuse_own_head,
    without_tied_head,
)
from diffxfer.diffs.matching.with_target import Given, match_target
from diffxfer.diffs.vocab.tensors import sort_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.matching.match import TargetMatch
    from diffxfer.diffs.matching.role import Role
    from diffxfer.diffs.matching.selection import Selection


def names_to_choose(source: Source, target: Role, labels: Mapping[str, str]) -> set[str]:
    """The names that an option may match: the target's, and those of tensors that it lacks.

    Args:
        source: the source of Δ.
        target: the target.
        labels: the target's names of other roles' tensors.
    """
    match = source.match
    known = {*(d.name for d in match.differences), *match.kept, *match.left_out, *match.unchanged}
    known |= {fate.name for fate in match.fates} | {problem.name for problem in match.problems}
    known |= {spec.name for spec in match.added} | source.buffers.keys()
    known -= labels.keys()
    return {*target.checkpoint.tensors, *target.buffers, *known}


def label_source(source: Source, target: Checkpoint) -> dict[str, str]:
    """The target's names of a diff vector's tensors, where it has them.

    Args:
        source: the diff vector.
        target: the target.
    """
    match = source.match
    known = {d.name: d.shape for d in match.differences}
    shapes = {name: spec.shape for name, spec in target.tensors.items()}
    whole = [spec.name for spec in match.added]
    known_or_not = {**known, **dict.fromkeys((*match.kept, *match.left_out, *whole))}
    pairs = pair_tensors(shapes, known_or_not, ("target", "finetuned"))
    return {theirs: ours for ours, theirs in pairs.items()}


def choose_added(
    source: Source, added: str, selection: Selection, labels: Mapping[str, str]
) -> None:
    """Bring, drop or refuse the tensors that a diff vector stores whole.

    Args:
        source: the diff vector; tensors that are not brought are removed from it.
        added: the value of ``--added``.
        selection: the tensors that the user selected.
        labels: the target's names of the diff vector's tensors.
    """
    match = source.match
    brought: list[StoredTensor] = []
    for spec in match.added:
        if not selection.selects(labels.get(spec.name, spec.name)):
            match.left_out[spec.name] = spec.elements
        elif added == "bring":
            brought.append(spec)
        elif added == "drop":
            match.fates.append(Fate("dropped", spec.name, spec.elements, ADDED))
        else:
            holders = tuple(source.entries)
            reason = in_only(holders)
            expected = described(spec)
            problem = Problem("target", spec.name, "nothing", expected, reason, holders, True)
            match.problems.append(problem)
    match.added[:] = brought


def head_of_target(source: Source, target: Checkpoint) -> Head:
    """The target's output head; absent if it is tied and finetuned's head replaces it.

    Args:
        source: the source of Δ and of the head.
        target: the target.
    """
    head = find_head(target.tensors, target.config)
    brings = bool(source.match.added) and source.heads.get("finetuned") is HeadState.ABSENT
    if brings and head.state is HeadState.TIED:
        return Head(HeadState.ABSENT, None, head.embedding)
    return head


def other_fates(source: Source, role: Role) -> list[Fate]:
    """The fates of buffers and of the tensors that finetuned brings.

    Args:
        source: the source of Δ.
        role: the target.
    """
    own = {canonical(name) for name in role.buffers}
    lost = {n: count for n, count in source.buffers.items() if canonical(n) not in own}
    return [
        *(Fate("copied", name, spec.elements, BUFFER) for name, spec in role.buffers.items()),
        *(Fate("dropped", name, count, BUFFER) for name, count in lost.items()),
        *(Fate("brought", spec.name, spec.elements, ADDED) for spec in source.match.added),
    ]


def target_side(target: Checkpoint, head: Head) -> Side:
    """The target's tensors, without a head that is a copy of its embedding."""
    tensors = without_tied_head(target.tensors, head)
    return Side("target", tensors, *sort_tensors(tensors, target.config))


@dataclass(frozen=True, slots=True)
class Output:
    """How the tensors of a graft are made.

    Attributes:
        role: the target, without the buffers of a head that is replaced.
        head: its output head.
        side: its tensors as they are matched.
        match: which of them get a difference, and which are copied.
        added: the tensors that finetuned brings.
    """

    role: Role
    head: Head
    side: Side
    match: TargetMatch
    added: Sequence[StoredTensor]


def match_output(source: Source, role: Role, selection: Selection, added: str) -> Output:
    """Pair the differences with the target's tensors.

    Args:
        source: the source of Δ.
        role: the target.
        selection: the tensors that the user selected, by the target's names.
        added: what to do with the tensors that only finetuned has.

    Raises:
        MatchError: as `match_roles`.
    """
    head = head_of_target(source, role.checkpoint)
    side = target_side(role.checkpoint, head)
    match = match_roles(source, side, head, selection, added)
    return Output(_without_replaced(role, match), head, side, match, source.match.added)


def _without_replaced(role: Role, match: TargetMatch) -> Role:
    """The target without the buffers of a head that is replaced."""
    others = role.checkpoint.tensors.keys() - set(match.replaced)
    gone = find_added_buffers(role.buffers, match.replaced, others)
    match.fates += [Fate("dropped", n, role.buffers[n].elements, REPLACED) for n in sorted(gone)]
    return replace(role, buffers={n: s for n, s in role.buffers.items() if n not in gone})


def match_roles(
    source: Source, side: Side, head: Head, selection: Selection, added: str
) -> TargetMatch:
    """Pair the differences with the target's tensors; see `ties` for the head.

    Args:
        source: the source of Δ.
        side: the target's tensors.
        head: the target's output head.
        selection: the tensors that the user selected, by the target's names.
        added: what to do with the tensors that only finetuned has.

    Raises:
        MatchError: if names can be paired in two ways, or the target ties its head and finetuned
            or base does not.
    """
    _refuse_own_heads(source, head, selection)
    differences = list(source.match.differences)
    left_out = source.left_out(head.state)
    if head.state is HeadState.OWN and source.shared_head is not None:
        differences.append(source.shared_head)
    if head.state is HeadState.TIED:
        # The heads of finetuned and base equal their embeddings, or are left out.
        heads = {d.name: d.sources[0].elements for d in differences if is_head(d.name)}
        differences = [d for d in differences if d.name not in heads]
        left_out = left_out | heads
    given = Given(
        source.match.kept,
        left_out,
        source.match.added,
        is_part=source.match.is_part,
        excuses_heads=source.match.excuses_heads or added == "drop",
        keeps_words=source.match.keeps_words,
        unchanged=source.match.unchanged,
        holders=tuple(source.entries),
    )
    match = match_target(differences, side, selection, given)
    # A tensor that does not fit base has been reported already; do not report it again.
    told = {problem.name for problem in source.match.problems}
    match.problems = [problem for problem in match.problems if problem.name not in told]
    source.match.problems[:] = [_with_target(p, side) for p in source.match.problems]
    return match


def _with_target(problem: Problem, side: Side) -> Problem:
    """A problem of finetuned and base; the target joins its holders if it has the tensor."""
    if not problem.holders or problem.name not in side.tensors:
        return problem
    holders = (*problem.holders, "target")
    return replace(problem, holders=holders, reason=in_only(holders))


def _refuse_own_heads(source: Source, head: Head, selection: Selection) -> None:
    if head.state is not HeadState.TIED or not selection.selects(head.name or HEAD):
        return
    if any(is_head(name) for name in source.match.left_out):
        return
    for role, state in source.heads.items():
        if state is HeadState.OWN:
            raise refuse_own_head(role, head.name or HEAD)


def count_tied_head(match: TargetMatch, head: Head, selection: Selection) -> list[str]:
    """Count the target's tied head among the fates; warn if options on it have no effect."""
    if head.state is not HeadState.TIED or head.name is None or head.embedding is None:
        return []
    found = next((fate for fate in match.fates if fate.name == head.embedding), None)
    if found is not None:
        match.fates.append(replace(found, name=head.name, why=f"tied to {head.embedding}"))
    ways = [(selection.selects(n), selection.alpha_of(n)) for n in (head.name, head.embedding)]
    if ways[0] == ways[1]:
        return []
    return [
        f"{head.name} is tied to {head.embedding} in the target and stays tied: --include,"
        " --exclude and --alpha-for have no effect on it"
    ]
