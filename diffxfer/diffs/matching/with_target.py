"""Pairing differences with the target's tensors: which are grafted, copied or dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.matching.added import find_replaced
from diffxfer.diffs.matching.match import (
    COPY,
    LEFT_OUT,
    OUTSIDE,
    OWN_HEAD,
    REPLACED,
    UNCHANGED,
    Difference,
    Fate,
    Problem,
    Side,
    TargetMatch,
    described,
    in_only,
    shapes_fit,
)
from diffxfer.diffs.matching.names import is_head_name, pair_names
from diffxfer.diffs.matching.parts import outside_part, pair_tensors
from diffxfer.diffs.matching.shared import part_copies, share

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.matching.selection import Selection

_ROLES = ("target", "finetuned")


@dataclass(frozen=True, slots=True)
class Given:
    """The source's tensors and properties besides the differences.

    Attributes:
        kept: finetuned's names of integer tensors, which have no Δ.
        left_out: finetuned's tensors that the user left out, with their numbers of elements; 0 if
            a diff vector does not record it.
        added: finetuned's tensors that are brought whole.
        is_part: whether finetuned is a part of base or the reverse, so that the target may have
            more tensors too.
        excuses_heads: whether the target may have a head that finetuned lacks, because finetuned
            has a different one.
        keeps_words: whether `excuses_heads` excludes the language-model head, because finetuned
            has one.
        unchanged: finetuned's tensors that have no difference, since an adapter does not change
            them.
        holders: the roles that have a difference's tensor, for messages.
    """

    kept: Collection[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    added: Collection[StoredTensor] = ()
    is_part: bool = False
    excuses_heads: bool = False
    keeps_words: bool = False
    unchanged: Collection[str] = ()
    holders: tuple[str, ...] = ("finetuned", "base")


def match_target(
    differences: Iterable[Difference], target: Side, selection: Selection, given: Given
) -> TargetMatch:
    """Pair differences with the target's tensors.

    Args:
        differences: the tensors of Δ.
        target: the target's tensors.
        selection: the tensors that the user selected, by the target's names.
        given: the source's other tensors.

    Returns:
        The match.

    Raises:
        MatchError: if names can be paired in two ways, or copies of one tensor differ.
    """
    return _TargetMatcher(differences, target, selection, given).run()


class _TargetMatcher:
    """One call of `match_target`."""

    def __init__(
        self,
        differences: Iterable[Difference],
        target: Side,
        selection: Selection,
        given: Given,
    ) -> None:
        self._match = TargetMatch(ambiguous=target.ambiguous)
        self._by_name = {difference.name: difference for difference in differences}
        self._target = target
        self._selection = selection
        self._given = given
        self._known: dict[str, tuple[int, ...] | None] = {
            name: None if d.vocabulary or name in target.vocabulary else d.shape
            for name, d in self._by_name.items()
        }
        self._known |= dict.fromkeys((*given.kept, *given.left_out, *given.unchanged))
        shapes = {
            name: None if name in target.vocabulary else spec.shape
            for name, spec in target.tensors.items()
        }
        self._pairs = pair_tensors(shapes, self._known, _ROLES)
        stored = self._target_vocabulary(), self._vocabulary()
        roles = "target", " or ".join(given.holders)
        part_copies(*stored, self._pairs, roles)
        self._copies = share(*stored, self._pairs, roles)

    def _target_vocabulary(self) -> dict[str, tuple[StoredTensor, ...]]:
        tensors = self._target.tensors
        return {name: (tensors[name],) for name in sorted(self._target.vocabulary)}

    def _vocabulary(self) -> dict[str, tuple[StoredTensor, ...]]:
        return {name: d.sources for name, d in self._by_name.items() if d.vocabulary}

    def run(self) -> TargetMatch:
        """Match every tensor."""
        match = self._match
        match.shared.update(self._copies[0])
        alone = [
            name
            for name in self._target.tensors
            if name not in self._pairs and name not in match.shared
        ]
        added = [spec.name for spec in self._given.added]
        taken = pair_names(alone, added, _ROLES)
        replaced = {name for name in taken if is_head_name(name)}
        match.named.update((taken[name], name) for name in replaced)
        if self._given.excuses_heads:
            keeps_words = self._given.keeps_words
            replaced |= find_replaced(alone, self._pairs.keys(), keeps_words=keeps_words)
        outside = frozenset[str]()
        if self._given.is_part:
            outside = outside_part(self._pairs.keys(), alone)
        for name, spec in self._target.tensors.items():
            if name in match.shared:
                continue
            if name in outside and self._selection.selects(name):
                self._copy(spec, OUTSIDE)
            elif name in replaced:
                self._replace(spec)
            elif name in taken:
                self._refuse_lack(spec)
            else:
                self._place(name, spec)
        kinds = {fate.name: fate.kind for fate in match.fates}
        for name, same in match.shared.items():
            # A refused tensor has no fate, so its copy has none either.
            if same in kinds:
                elements = self._target.tensors[name].elements
                match.fates.append(Fate(kinds[same], name, elements, COPY + same))
        self._drop_rest()
        return match

    def _replace(self, spec: StoredTensor) -> None:
        """Drop or copy a head that only the target has: dropped if finetuned brings another."""
        if self._given.added:
            self._match.replaced.append(spec.name)
            self._match.fates.append(Fate("dropped", spec.name, spec.elements, REPLACED))
        else:
            self._copy(spec, OWN_HEAD)

    def _place(self, name: str, spec: StoredTensor) -> None:
        pair = self._pairs.get(name)
        source = self._by_name.get(pair or "")
        if not self._selection.selects(name):
            self._copy(spec, LEFT_OUT)
        elif pair in self._given.unchanged:
            self._copy(spec, UNCHANGED)
        elif spec.dtype not in FLOATS:
            self._copy_integer(spec, source, known=pair is not None)
        elif source is not None:
            self._graft(source, spec)
        elif pair in self._given.kept:
            self._refuse(spec, "an integer tensor in finetuned", "another kind of dtype")
        elif pair is not None:
            self._copy(spec, "not part of the diff vector")
        elif self._selection.may_be_missing(name):
            self._copy(spec, "only the target has it")
        else:
            self._refuse_alone(spec)

    def _copy(self, spec: StoredTensor, why: str) -> None:
        self._match.copies.append(spec)
        self._match.fates.append(Fate("copied", spec.name, spec.elements, why))

    def _copy_integer(self, spec: StoredTensor, source: Difference | None, *, known: bool) -> None:
        if source is not None:
            expected = f"{described(source.sources[0])} in finetuned"
            self._refuse(spec, expected, "another kind of dtype")
        elif known or self._selection.may_be_missing(spec.name):
            self._copy(spec, f"{spec.dtype} is not part of a diff vector")
        else:
            self._refuse_alone(spec)

    def _refuse(self, spec: StoredTensor, expected: str, reason: str) -> None:
        problem = Problem("target", spec.name, described(spec), expected, reason)
        self._match.problems.append(problem)

    def _refuse_alone(self, spec: StoredTensor) -> None:
        self._match.problems.append(
            Problem(
                *("finetuned", spec.name, "nothing", described(spec), "in target only"),
                ("target",),
            )
        )

    def _refuse_lack(self, spec: StoredTensor) -> None:
        """Refuse a tensor that was stored as added but is not a head: base lacks it."""
        holders = (self._given.holders[0], "target")
        self._match.problems.append(
            Problem("base", spec.name, "nothing", described(spec), in_only(holders), holders)
        )

    def _graft(self, source: Difference, spec: StoredTensor) -> None:
        vocabulary = source.vocabulary or spec.name in self._target.vocabulary
        ours = source.sources[0]
        if not shapes_fit(ours, spec, vocabulary=vocabulary):
            self._refuse(spec, f"{described(ours)} in finetuned", "another shape")
            return
        if vocabulary != source.vocabulary:
            source = Difference(source.name, source.sources, vocabulary)
        self._match.grafts.append((source, spec))
        alpha = self._selection.alpha_of(spec.name)
        kind, why = ("grafted", "") if alpha != 0 else ("copied", "alpha is 0")
        if alpha not in (0, self._selection.alpha):
            why = f"alpha is {alpha:g}"
        self._match.fates.append(Fate(kind, spec.name, spec.elements, why))

    def _drop_rest(self) -> None:
        """Drop or refuse the differences without a counterpart in the target."""
        for name in self._known.keys() - set(self._pairs.values()):
            difference = self._by_name.get(name)
            elements = difference.sources[0].elements if difference else 0
            if name in self._given.left_out or not self._selection.selects(name):
                elements = elements or self._given.left_out.get(name, 0)
                why = LEFT_OUT
            elif name in self._given.unchanged:
                why = UNCHANGED
            elif name in self._copies[1]:
                why = COPY + self._copies[1][name]
            elif self._selection.may_be_missing(name):
                why = "target has none"
            else:
                spec = difference.sources[0] if difference else None
                expected = described(spec) if spec else "an integer tensor"
                holders = self._given.holders
                reason = in_only(holders)
                problem = Problem("target", name, "nothing", expected, reason, holders)
                self._match.problems.append(problem)
                continue
            self._match.fates.append(Fate("dropped", name, elements, why))
