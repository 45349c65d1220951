"""Pairing rows of finetuned with rows of the target, by the rules in `pair_base`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.diffs.vocab.pair_base import (
    NONE,
    check_mode,
    differing_ids,
    is_harmless,
    pair_by_position,
    pair_by_string,
    token_at,
    unlike_tokens,
)
from diffxfer.errors import VocabularyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.vocab.pair_base import Ids
    from diffxfer.diffs.vocab.tokens import Tokenizer

# Below this share of paired tokens the tokenizers are hardly related.
_RELATED = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class TargetPairing:
    """The row of the output that each row of the difference is grafted onto.

    Attributes:
        mode: ``"ids"`` or ``"tokens"``.
        finetuned_ids: by output id, shape ``(output tokens,)``: the finetuned id whose difference
            is grafted, or `NONE` (the target's row is kept, or the id is in ``additions``).
        additions: output id to the finetuned id whose row is brought whole.
        translate: finetuned id to output id, for every token that has a place in the output.
        renamed: output id to the name that the target's tokenizer gets there.
        names: output id to token, for ``additions``.
        dropped: tokens whose difference is lost because the target has no place for them.
        warnings: what a user should know.
        kept: output id to finetuned id, for tokens that finetuned added and the target has: the
            target's row is kept if it exists, otherwise finetuned's is brought whole.
    """

    mode: str
    finetuned_ids: Ids
    additions: Mapping[int, int]
    translate: Mapping[int, int]
    renamed: Mapping[int, str]
    names: Mapping[int, str]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    kept: Mapping[int, int] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether every token that has a place in the output has finetuned's id there."""
        ids = self.finetuned_ids
        moved = (ids != NONE) & (ids != np.arange(len(ids)))
        return not (self.additions or moved.any() or (self.mode == "tokens" and self.dropped))


def pair_with_target(
    finetuned: Tokenizer,
    added: Mapping[int, str],
    renamed: Mapping[int, str],
    target: Tokenizer,
    mode: str = "auto",
) -> TargetPairing:
    """Pair finetuned's tokens with the target's; `diffxfer.diffs.vocab.pair_base` has the rules.

    Args:
        finetuned: finetuned's tokenizer.
        added: the tokens that finetuned added, from its `BasePairing`.
        renamed: the slots that finetuned renamed, from its `BasePairing`.
        target: the target's tokenizer.
        mode: ``"auto"``, ``"tokens"``, or ``"ids"``: every id that both have pairs by position, and
            a slot that finetuned renamed gets finetuned's name, whatever its name in the target.

    Returns:
        The pairing.

    Raises:
        OptionError: there is no such mode.
        VocabularyError: the target has no place for a token that finetuned uses, or ``added`` and
            ``renamed`` do not belong to this tokenizer.
    """
    check_mode(mode)
    _check_changes(finetuned, added, renamed)
    apart = [i for i in differing_ids(finetuned, target) if i not in added]
    trusted = mode == "ids"
    draft = _Draft(finetuned, target)
    if mode == "auto":
        mode = "ids" if _positions_hold(apart, renamed, draft) else "tokens"
    draft.place(added, renamed, mode, trusted=trusted)
    plain = (i for i in apart if i not in renamed)
    unlike = unlike_tokens(plain, finetuned, target, "the target")
    if used := draft.dropped_in_use():
        trial = _Draft(finetuned, target)
        trial.place(added, renamed, "ids", trusted=True)
        by_position = not (trusted or unlike) and _idle_slots_hold(used, trial)
        raise _no_place(used, draft, by_position=by_position)
    if mode == "ids":
        draft.warnings += unlike
    return draft.result(mode)


def _positions_hold(apart: list[int], renamed: Mapping[int, str], draft: _Draft) -> bool:
    """Whether finetuned's rows may pair with the target's by position."""
    finetuned, target = draft.finetuned, draft.target
    for i in apart:
        if i not in renamed:
            if not is_harmless(i, finetuned, target):
                return False
            continue
        moved = renamed[i] in draft.ids and token_at(target, i) != renamed[i]
        if moved and finetuned.tokens[i] not in draft.ids:
            return False
    return True


class _Draft:
    """A `TargetPairing` in the making."""

    def __init__(self, finetuned: Tokenizer, target: Tokenizer) -> None:
        self.finetuned = finetuned
        self.target = target
        self.ids = target.ids()
        self.finetuned_ids = np.full(len(target.tokens), NONE, dtype=np.int64)
        self.translate: dict[int, int] = {}
        self.renamed: dict[int, str] = {}
        self.additions: dict[int, int] = {}
        self.kept: list[str] = []
        self.kept_rows: dict[int, int] = {}
        self.warnings: tuple[str, ...] = ()

    def place(
        self, added: Mapping[int, str], renamed: Mapping[int, str], mode: str, *, trusted: bool
    ) -> None:
        """Find every token's place; if ``trusted``, a renamed slot keeps its id in any case."""
        changed = {*added, *renamed}
        self._pair(mode, changed)
        new = {self.finetuned.tokens[i] for i in changed}
        for i, name in sorted(renamed.items()):
            # If the target has another of finetuned's new tokens there, the slot is that token's.
            here = trusted and token_at(self.target, i) not in new
            self._place_renamed(i, name, here=here)
        for i, token in sorted(added.items()):
            self._place_added(i, token)

    def _pair(self, mode: str, without: set[int]) -> None:
        """Pair every token except those in ``without``."""
        pair = pair_by_position if mode == "ids" else pair_by_string
        sources, places = pair(self.finetuned, self.target)
        if without:
            plain = ~np.isin(sources, list(without))
            sources, places = sources[plain], places[plain]
        self.finetuned_ids[places] = sources
        self.translate = dict(zip(sources.tolist(), places.tolist(), strict=True))

    def _place_renamed(self, i: int, base_name: str, *, here: bool) -> None:
        """Find the slot that finetuned renamed; if ``here``, at its id whatever its name."""
        token = self.finetuned.tokens[i] or ""
        own = token_at(self.target, i)
        if own == token:
            place: int | None = i
        elif token in self.ids:
            self._keep(i, token)
            return
        else:
            here = own == base_name or (here and own is not None)
            place = i if here else self.ids.get(base_name)
        if place is None or self.finetuned_ids[place] != NONE:
            return
        self.finetuned_ids[place] = i
        self.translate[i] = place
        if own != token:
            self.renamed[place] = token
            if self.target.tokens[place] != base_name:
                self.warnings += (f"the target's {own!r} (id {place}) is renamed to {token!r}",)

    def _place_added(self, i: int, token: str) -> None:
        """Bring the row of a token that finetuned added, unless the target has the token."""
        if token in self.ids:
            self._keep(i, token)
            self.kept_rows[self.ids[token]] = i
            return
        place = len(self.target.tokens) + len(self.additions)
        self.additions[place] = i
        self.translate[i] = place

    def _keep(self, i: int, token: str) -> None:
        """Keep the target's row of a token that base lacks."""
        place = self.ids[token]
        # Pairing by position may have given that row to a slot that finetuned does not use.
        self.translate.pop(int(self.finetuned_ids[place]), None)
        self.finetuned_ids[place] = NONE
        self.translate[i] = place
        self.kept.append(token)

    def dropped(self) -> list[int]:
        """Finetuned's ids without a place in the output."""
        return [
            i
            for i, token in enumerate(self.finetuned.tokens)
            if token is not None and i not in self.translate
        ]

    def dropped_in_use(self) -> list[int]:
        """The dropped ids that finetuned uses."""
        return [i for i in self.dropped() if self.finetuned.matters(i)]

    def result(self, mode: str) -> TargetPairing:
        """The finished pairing."""
        if self.kept:
            self.warnings += (
                f"tokens that finetuned added, but the target already has ({len(self.kept)}), keep "
                f"the target's rows: {_listed(self.kept)}",
            )
        paired, total = np.count_nonzero(self.finetuned_ids != NONE), len(self.ids)
        if mode == "tokens" and paired < _RELATED * total:
            self.warnings += (
                f"only {paired} of the target's {total} tokens have a counterpart in finetuned: "
                "their tokenizers are barely related",
            )
        fresh = np.full(len(self.additions), NONE, dtype=np.int64)
        finetuned_ids = np.concatenate([self.finetuned_ids, fresh])
        finetuned_ids.flags.writeable = False
        tokens = self.finetuned.tokens
        return TargetPairing(
            mode=mode,
            finetuned_ids=finetuned_ids,
            additions=self.additions,
            translate=self.translate,
            renamed=self.renamed,
            names={place: tokens[i] or "" for place, i in self.additions.items()},
            dropped=tuple(tokens[i] or "" for i in self.dropped()),
            warnings=self.warnings,
            kept=self.kept_rows,
        )


def _check_changes(
    finetuned: Tokenizer, added: Mapping[int, str], renamed: Mapping[int, str]
) -> None:
    """Refuse changes that do not belong to this tokenizer: a manifest can be edited."""
    tokens = finetuned.tokens
    ids = [*added, *renamed]
    there = all(0 <= i < len(tokens) and tokens[i] is not None for i in ids)
    if (
        not there
        or any(tokens[i] != token for i, token in added.items())
        or len({tokens[i] for i in ids}) < len(ids)
    ):
        raise VocabularyError(
            "the diff vector",
            "lists added or renamed tokens that do not match finetuned's tokenizer",
            "extract it again",
        )


def _idle_slots_hold(used: list[int], trial: _Draft) -> bool:
    """Whether a trial pairing by position puts these tokens on special slots that are not used."""
    finetuned, target = trial.finetuned, trial.target
    ours = finetuned.ids()

    def is_idle(i: int) -> bool:
        twin = ours.get(target.tokens[i] or "")
        in_use = target.matters(i) or (twin is not None and finetuned.matters(twin))
        return i in target.special and not in_use

    stay = all(trial.translate.get(i) == i and is_idle(i) for i in used)
    return stay and not trial.dropped_in_use()


def _no_place(used: list[int], draft: _Draft, *, by_position: bool) -> VocabularyError:
    finetuned, first = draft.finetuned, used[0]
    problem = (
        f"does not have {finetuned.tokens[first]!r}, which finetuned uses ({finetuned.use(first)})"
    )
    if len(used) > 1:
        listed = _listed([finetuned.tokens[i] or "" for i in used])
        problem += f" ({len(used)} tokens in all: {listed})"
    remedy = (
        "add the token to the target's tokenizer, or stop using it in finetuned's chat template "
        "and configs"
    )
    if by_position:
        problem += f", and has {draft.target.tokens[first]!r} at its id ({first})"
        remedy += ", or give --vocab ids to pair rows by position, if that token can replace it"
    return VocabularyError("the target's tokenizer", problem, remedy)


def _listed(tokens: list[str]) -> str:
    first = ", ".join(repr(token) for token in tokens[:5])
    return f"{first}, ..." if len(tokens) > 5 else first
