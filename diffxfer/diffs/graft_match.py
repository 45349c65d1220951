"""Pairing a source of Δ with a target's tensors, its output head among them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.match import Side, match_target
from diffxfer.diffs.matching.names import is_head, pair_names
from diffxfer.diffs.matching.ties import HeadState, refuse_own_head, without_tied_head
from diffxfer.diffs.source import HEAD
from diffxfer.diffs.vocab.tensors import sort_tensors

if TYPE_CHECKING:
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.matching.match import TargetMatch
    from diffxfer.diffs.matching.selection import Selection
    from diffxfer.diffs.matching.ties import Head
    from diffxfer.diffs.source import Source


def names_to_choose(source: Source, target: Checkpoint) -> set[str]:
    """What an option may speak of: the target's names, and those that it has no tensor for."""
    match = source.match
    known = {*(d.name for d in match.differences), *match.kept, *match.left_out}
    known |= {fate.name for fate in match.fates} | {problem.name for problem in match.problems}
    paired = pair_names(target.tensors.keys(), known, ("the target", "finetuned"))
    return {*target.tensors, *(known - set(paired.values()))}


def target_side(target: Checkpoint, head: Head) -> Side:
    """The target's tensors, without a head that is a copy of its embedding."""
    tensors = without_tied_head(target.tensors, head)
    return Side("target", tensors, *sort_tensors(tensors, target.config))


def match_roles(source: Source, side: Side, head: Head, selection: Selection) -> TargetMatch:
    """Pair the differences with the target's tensors; see `ties` for the head.

    Args:
        source: where Δ comes from.
        side: the target's tensors.
        head: what the target has for an output head.
        selection: what the user chose, by the target's names.

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
        # Finetuned's and base's heads were found to say nothing of their own, or are left out.
        heads = {d.name: d.sources[0].elements for d in differences if is_head(d.name)}
        differences = [d for d in differences if d.name not in heads]
        left_out = left_out | heads
    match = match_target(differences, side, selection, kept=source.match.kept, left_out=left_out)
    # What does not fit base has no difference: that it has none for the target is no news.
    told = {problem.name for problem in source.match.problems}
    match.problems = [problem for problem in match.problems if problem.name not in told]
    return match


def _refuse_own_heads(source: Source, head: Head, selection: Selection) -> None:
    if head.state is not HeadState.TIED or not selection.selects(head.name or HEAD):
        return
    if any(is_head(name) for name in source.match.left_out):
        return
    for role, state in source.heads.items():
        if state is HeadState.OWN:
            raise refuse_own_head(role, HEAD)


def count_tied_head(match: TargetMatch, head: Head, selection: Selection) -> list[str]:
    """Count a head that the target keeps as a copy of its embedding; warn of idle options."""
    if head.state is not HeadState.TIED or head.name is None or head.embedding is None:
        return []
    found = next((fate for fate in match.fates if fate.name == head.embedding), None)
    if found is not None:
        match.fates.append(replace(found, name=head.name, why=f"tied to {head.embedding}"))
    ways = [(selection.selects(n), selection.alpha_of(n)) for n in (head.name, head.embedding)]
    if ways[0] == ways[1]:
        return []
    return [
        f"{head.name} is {head.embedding} in the target and stays so: what the options say of it"
        " has no effect"
    ]
