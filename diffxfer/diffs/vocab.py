"""Vocabularies: which row of an embedding or head meets which, role by role.

Two steps, since a diff vector is applied without its base. `pair_with_base` says from which row of
base each row of finetuned is subtracted; `pair_with_target` says on which row of the target that
difference is grafted. Both speak of token ids alone. `extract_runs` and `graft_runs` turn them into
runs of rows for one tensor, whose row counts may differ from the size of the tokenizer.

**ids**: rows pair by position, where the tokenizers agree, id by id, on every regular token, and on
every special token that finetuned uses (in a chat template, or as bos, eos or pad). Special tokens
that finetuned does not use may have other names: Llama 3.1 renamed reserved slots of Llama 3.0.

**tokens**: else rows pair by token string.

In both, these tokens are not like the others:

- *added*: base has no such token, nor a special slot at that id that finetuned renamed. It brings
  its own row whole. Where the target has the token, the target's row is kept; else it is appended,
  at the ids after the target's last token, in the order of finetuned's ids.
- *renamed*: base has a special slot at that id under another name (ChatML on a reserved token). It
  pairs with the target's slot at that id while that has base's name or finetuned's, else with the
  slot that has base's name (which makes it ``tokens``); the output's tokenizer gets finetuned's
  name. Where the target has finetuned's name at another id, that row is kept, as for an added one.
- *dropped*: the target has no place for it. Its difference is lost; where finetuned uses the token
  that is an error.
- a string that stands twice in a tokenizer: the first pairs with the first, the second with the
  second.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from diffxfer.errors import OptionError, VocabularyError
from diffxfer.streaming.plan import Run, RunKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from diffxfer.diffs.tokens import Tokenizer

    Ids: TypeAlias = NDArray[np.int64]
    _Pairs: TypeAlias = tuple[Ids, Ids]

ADDED = -1
"""Instead of a base id: base has no such token."""
NONE = -2
"""Instead of an id: this row has no counterpart."""

_MODES = ("auto", "ids", "tokens")

# Below this share of paired tokens the tokenizers are hardly related.
_RELATED = 0.5
_KINDS = (RunKind.GRAFT, RunKind.COPY, RunKind.ADD, RunKind.ZERO)
_GRAFT, _COPY, _ADD, _ZERO = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class BasePairing:
    """From which row of base each row of finetuned is subtracted.

    Attributes:
        mode: ``"ids"`` or ``"tokens"``.
        base_ids: by finetuned id, shape ``(finetuned tokens,)``: the base id, `ADDED`, or `NONE`.
        added: finetuned id to token, for tokens that finetuned added.
        renamed: finetuned id to base's name of that slot, for slots that finetuned renamed.
        base_tokens: the size of base's tokenizer; base's rows from there on are padding.
        warnings: what a user should know.
    """

    mode: str
    base_ids: Ids
    added: Mapping[int, str]
    renamed: Mapping[int, str]
    base_tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TargetPairing:
    """On which row of the output each row of the difference is grafted.

    Attributes:
        mode: ``"ids"`` or ``"tokens"``.
        finetuned_ids: by output id, shape ``(output tokens,)``: the finetuned id whose difference
            is grafted, or `NONE` (the target's row is kept, or the id is in ``additions``).
        additions: output id to the finetuned id whose own row is brought whole.
        translate: finetuned id to output id, for every token that has a place in the output.
        renamed: output id to the name that the target's tokenizer gets there.
        names: output id to token, for ``additions``.
        dropped: tokens whose difference is lost since the target has no place for them.
        warnings: what a user should know.
    """

    mode: str
    finetuned_ids: Ids
    additions: Mapping[int, int]
    translate: Mapping[int, int]
    renamed: Mapping[int, str]
    names: Mapping[int, str]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]


def pair_with_base(finetuned: Tokenizer, base: Tokenizer, mode: str = "auto") -> BasePairing:
    """Pair finetuned's tokens with base's; the module's docstring has the rules.

    Args:
        finetuned: its tokenizer.
        base: its tokenizer.
        mode: ``"auto"``, ``"tokens"``, or ``"ids"``: every id that both have pairs by position.

    Returns:
        The pairing.

    Raises:
        OptionError: there is no such mode.
    """
    _check_mode(mode)
    apart = _differing(finetuned, base)
    known = set(base.tokens)
    new = {i for i in apart if finetuned.tokens[i] not in known}
    slots = sorted(new & base.special)
    renamed = {i: name for i in slots if (name := _at(base, i)) is not None}
    if mode == "auto":
        unlike = (i for i in apart if i not in new or _at(base, i) is not None)
        same = all(i in renamed or _harmless(i, finetuned, base) for i in unlike)
        mode = "ids" if same else "tokens"
    base_ids = np.full(len(finetuned.tokens), NONE, dtype=np.int64)
    if mode == "ids":
        sources, places = _by_position(finetuned, base)
    else:
        sources, places = _by_string(finetuned, base)
        # Away from its id, a slot is known by its name alone: both must mean a special slot, and
        # base's name must be gone.
        names = set(finetuned.tokens)
        renamed = {
            i: name for i, name in renamed.items() if name not in names and i in finetuned.special
        }
        base_ids[list(renamed)] = list(renamed)
    base_ids[sources] = places
    added = _absent(finetuned, base_ids, known)
    base_ids[list(added)] = ADDED
    base_ids.flags.writeable = False
    trusted = (i for i in apart if i not in renamed)
    warnings = _unlike(trusted, finetuned, base, "base") if mode == "ids" else ()
    return BasePairing(mode, base_ids, added, renamed, len(base.tokens), warnings)


def _absent(finetuned: Tokenizer, base_ids: Ids, known: Collection[str | None]) -> dict[int, str]:
    """The unpaired tokens whose string base lacks, each string once."""
    found: dict[str, int] = {}
    for i in np.flatnonzero(base_ids == NONE).tolist():
        token = finetuned.tokens[i]
        if token is not None and token not in known:
            found.setdefault(token, i)
    return {i: token for token, i in found.items()}


def pair_with_target(
    finetuned: Tokenizer,
    added: Mapping[int, str],
    renamed: Mapping[int, str],
    target: Tokenizer,
    mode: str = "auto",
) -> TargetPairing:
    """Pair finetuned's tokens with the target's; the module's docstring has the rules.

    Args:
        finetuned: its tokenizer.
        added: what finetuned added, from its `BasePairing`.
        renamed: what finetuned renamed, from its `BasePairing`.
        target: its tokenizer.
        mode: ``"auto"``, ``"tokens"``, or ``"ids"``: every id that both have pairs by position, and
            a slot that finetuned renamed gets finetuned's name whatever the target calls it.

    Returns:
        The pairing.

    Raises:
        OptionError: there is no such mode.
        VocabularyError: the target has no place for a token that finetuned uses, or ``added`` and
            ``renamed`` are not of this tokenizer.
    """
    _check_mode(mode)
    _check_changes(finetuned, added, renamed)
    apart = [i for i in _differing(finetuned, target) if i not in added]
    trusted = mode == "ids"
    draft = _Draft(finetuned, target)
    if mode == "auto":
        mode = "ids" if _positions_hold(apart, renamed, draft) else "tokens"
    pair = _by_position if mode == "ids" else _by_string
    changed = {*added, *renamed}
    draft.pair(pair, changed)
    new = {finetuned.tokens[i] for i in changed}
    for i, name in sorted(renamed.items()):
        # A slot that the target gave to another of finetuned's new tokens is that token's.
        draft.place_renamed(i, name, here=trusted and _at(target, i) not in new)
    for i, token in sorted(added.items()):
        draft.place_added(i, token)
    dropped = draft.dropped()
    _refuse_used(finetuned, dropped)
    if mode == "ids":
        plain = (i for i in apart if i not in renamed)
        draft.warnings += _unlike(plain, finetuned, target, "the target")
    return draft.result(mode, dropped)


def _positions_hold(apart: list[int], renamed: Mapping[int, str], draft: _Draft) -> bool:
    """Whether finetuned's rows may go on the target's by position."""
    finetuned, target = draft.finetuned, draft.target
    for i in apart:
        if i not in renamed:
            if not _harmless(i, finetuned, target):
                return False
            continue
        moved = renamed[i] in draft.ids and _at(target, i) != renamed[i]
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
        self.warnings: tuple[str, ...] = ()

    def pair(self, pairs: Callable[[Tokenizer, Tokenizer], _Pairs], without: set[int]) -> None:
        """Pair every token but those."""
        sources, places = pairs(self.finetuned, self.target)
        if without:
            plain = ~np.isin(sources, list(without))
            sources, places = sources[plain], places[plain]
        self.finetuned_ids[places] = sources
        self.translate = dict(zip(sources.tolist(), places.tolist(), strict=True))

    def place_renamed(self, i: int, base_name: str, *, here: bool) -> None:
        """Find the slot that finetuned renamed: at its id whatever its name, if ``here``."""
        token = self.finetuned.tokens[i] or ""
        own = _at(self.target, i)
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
                self.warnings += (f"the target's {own!r} (id {place}) becomes {token!r}",)

    def place_added(self, i: int, token: str) -> None:
        """Bring the row of a token that finetuned added, unless the target has the token."""
        if token in self.ids:
            self._keep(i, token)
            return
        place = len(self.target.tokens) + len(self.additions)
        self.additions[place] = i
        self.translate[i] = place

    def _keep(self, i: int, token: str) -> None:
        """Keep the target's row of a token that is new to finetuned's base."""
        place = self.ids[token]
        # By position, a slot that finetuned does not use may have been paired with that row.
        self.translate.pop(int(self.finetuned_ids[place]), None)
        self.finetuned_ids[place] = NONE
        self.translate[i] = place
        self.kept.append(token)

    def dropped(self) -> list[int]:
        """Finetuned's ids that have no place in the output."""
        return [
            i
            for i, token in enumerate(self.finetuned.tokens)
            if token is not None and i not in self.translate
        ]

    def result(self, mode: str, dropped: list[int]) -> TargetPairing:
        """What was found, for good."""
        if self.kept:
            self.warnings += (
                f"tokens that finetuned added and the target has already, {len(self.kept)} in all, "
                f"keep the target's rows: {_listed(self.kept)}",
            )
        paired, total = np.count_nonzero(self.finetuned_ids != NONE), len(self.ids)
        if mode == "tokens" and paired < _RELATED * total:
            self.warnings += (
                f"only {paired} of the target's {total} tokens have a counterpart in finetuned: "
                "their tokenizers are hardly related",
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
            dropped=tuple(tokens[i] or "" for i in dropped),
            warnings=self.warnings,
        )


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise OptionError("--vocab", f"is {mode!r}", f"use one of {', '.join(_MODES)}")


def _check_changes(
    finetuned: Tokenizer, added: Mapping[int, str], renamed: Mapping[int, str]
) -> None:
    """Refuse changes that are not of this tokenizer: a manifest can be edited."""
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
            "lists added or renamed tokens that are not those of finetuned's tokenizer",
            "extract it again",
        )


def _refuse_used(finetuned: Tokenizer, dropped: list[int]) -> None:
    used = [i for i in dropped if finetuned.matters(i)]
    if not used:
        return
    token, use = finetuned.tokens[used[0]], finetuned.use(used[0])
    more = f" ({len(used)} such tokens: {_listed([finetuned.tokens[i] or '' for i in used])})"
    raise VocabularyError(
        "the target's tokenizer",
        f"has no place for {token!r}, which is in use by finetuned ({use})"
        + (more if len(used) > 1 else ""),
        "add the token to the target's tokenizer, or stop using it in finetuned's chat template "
        "and configs",
    )


def _listed(tokens: list[str]) -> str:
    first = ", ".join(repr(token) for token in tokens[:5])
    return f"{first}, ..." if len(tokens) > 5 else first


def _differing(finetuned: Tokenizer, other: Tokenizer) -> list[int]:
    """The ids at which finetuned has a token and the other has another, or none."""
    if finetuned.fingerprint == other.fingerprint:
        return []
    pairs = zip_longest(finetuned.tokens, other.tokens[: len(finetuned.tokens)])
    return [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs and ours is not None]


def _at(tokenizer: Tokenizer, i: int) -> str | None:
    return tokenizer.tokens[i] if i < len(tokenizer.tokens) else None


def _harmless(i: int, finetuned: Tokenizer, other: Tokenizer) -> bool:
    """Whether it is a special slot on both sides that finetuned does not use."""
    special = i in finetuned.special and (i in other.special or _at(other, i) is None)
    return special and not finetuned.matters(i)


def _unlike(
    apart: Iterable[int], finetuned: Tokenizer, other: Tokenizer, role: str
) -> tuple[str, ...]:
    """A warning of the tokens that were paired by position under two names, if they are regular."""
    regular = [
        i
        for i in apart
        if _at(other, i) is not None and not (i in finetuned.special and i in other.special)
    ]
    if not regular:
        return ()
    i = regular[0]
    return (
        f"paired by id although {len(regular)} regular tokens differ between finetuned and {role} "
        f"(the first is id {i}: {finetuned.tokens[i]!r} and {other.tokens[i]!r})",
    )


def _by_position(finetuned: Tokenizer, other: Tokenizer) -> _Pairs:
    """The ids at which both have a token."""
    pairs = zip(finetuned.tokens, other.tokens, strict=False)
    ids = np.flatnonzero([ours is not None and theirs is not None for ours, theirs in pairs])
    return ids, ids


def _by_string(finetuned: Tokenizer, other: Tokenizer) -> _Pairs:
    """The ids of the same string; where it stands twice, the first with the first, and so on."""
    keys = _keys(other.tokens)
    places = dict(zip(keys, range(len(keys)), strict=True))
    places.pop(None, None)
    found = [places.get(key, NONE) for key in _keys(finetuned.tokens)]
    ids = np.array(found, dtype=np.int64)
    sources = np.flatnonzero(ids != NONE)
    return sources, ids[sources]


def _keys(tokens: Sequence[str | None]) -> Sequence[str | tuple[str, int] | None]:
    """The tokens, with a number where one has stood before."""
    if len(set(tokens)) == len(tokens):
        return tokens
    seen: dict[str | None, int] = {}
    keys: list[str | tuple[str, int] | None] = []
    for token in tokens:
        before = seen[token] = seen.get(token, -1) + 1
        keys.append((token, before) if before and token is not None else token)
    return keys


def extract_runs(
    base_pairing: BasePairing | None, *, finetuned_rows: int, base_rows: int
) -> list[Run]:
    """The runs of a vocabulary tensor of the diff vector, whose inputs are (finetuned, base).

    Args:
        base_pairing: how the tokens pair; None where no role has a tokenizer: by position.
        finetuned_rows: the tensor's rows in finetuned, and in the diff vector.
        base_rows: its rows in base.

    Returns:
        Runs that cover the rows: ``GRAFT`` (a difference), ``ADD`` (finetuned's own row, of a token
        that it added) and ``ZERO`` (no token, or no row of it in base).

    Raises:
        VocabularyError: finetuned lacks the row of a token that it shares with base, or there is no
            tokenizer and the row counts differ.
    """
    rows = np.arange(finetuned_rows, dtype=np.int64)
    if base_pairing is None:
        _same_rows({"finetuned": finetuned_rows, "base": base_rows})
        return _runs(np.full(finetuned_rows, _GRAFT), rows, rows)
    _check_lost(base_pairing, finetuned_rows, base_rows)
    ids = _fit(base_pairing.base_ids, finetuned_rows)
    padding = max(len(base_pairing.base_ids), base_pairing.base_tokens)
    ids[padding:] = rows[padding:]
    kind = np.full(finetuned_rows, _ZERO)
    kind[(ids >= 0) & (ids < base_rows)] = _GRAFT
    kind[ids == ADDED] = _ADD
    return _runs(kind, np.where(kind == _ZERO, -1, rows), np.where(kind == _GRAFT, ids, -1))


def graft_runs(
    pairing: TargetPairing | None,
    base_pairing: BasePairing | None,
    *,
    finetuned_rows: int,
    base_rows: int | None,
    target_rows: int,
) -> tuple[int, list[Run]]:
    """The runs of a vocabulary tensor of the output.

    The inputs are (finetuned, base, target), or (diff vector, target) where ``base_rows`` is None.

    Args:
        pairing: how the tokens pair; None where no role has a tokenizer: by position.
        base_pairing: how finetuned's pair with base's; None where the diff vector stands for both,
            or base has no tokenizer: by position.
        finetuned_rows: the tensor's rows in finetuned, or in the diff vector.
        base_rows: its rows in base, None where the diff vector stands for both.
        target_rows: its rows in the target.

    Returns:
        The output's rows, and runs that cover them: ``GRAFT``, ``COPY`` (the target's row is kept)
        and ``ADD`` (finetuned's own row, of a token that it added). Rows grow only where the
        target's padding rows do not hold the added tokens.

    Raises:
        VocabularyError: finetuned lacks the row of a token that it shares with base, the target
            lacks rows below an added token's, or there is no tokenizer and the row counts differ.
    """
    if pairing is None:
        counts = {"finetuned": finetuned_rows, "base": base_rows, "target": target_rows}
        present = {role: count for role, count in counts.items() if count is not None}
        _same_rows(present)
        rows = np.arange(target_rows, dtype=np.int64)
        return target_rows, _runs(np.full(target_rows, _GRAFT), *[rows] * len(present))
    if base_pairing is not None and base_rows is not None:
        _check_lost(base_pairing, finetuned_rows, base_rows)
    added, output_rows = _additions(pairing, finetuned_rows, target_rows)
    rows = np.arange(output_rows, dtype=np.int64)
    ids = _fit(pairing.finetuned_ids, output_rows)
    graft = (ids >= 0) & (ids < finetuned_rows) & (rows < target_rows)
    base_ids = ids
    if base_rows is not None:
        if base_pairing is not None:
            paired = _fit(base_pairing.base_ids, max(finetuned_rows, 1))
            base_ids = np.where(graft, paired[np.where(graft, ids, 0)], NONE)
        graft &= (base_ids >= 0) & (base_ids < base_rows)
    kind = np.where(graft, _GRAFT, _COPY)
    kind[list(added)] = _ADD
    sources = np.where(graft, ids, -1)
    sources[list(added)] = list(added.values())
    inputs = [sources, np.where(kind == _ADD, -1, rows)]
    if base_rows is not None:
        inputs.insert(1, np.where(graft, base_ids, -1))
    return output_rows, _runs(kind, *inputs)


def _additions(
    pairing: TargetPairing, finetuned_rows: int, target_rows: int
) -> tuple[dict[int, int], int]:
    """The additions that have a row in finetuned, and the output's row count."""
    added = {place: i for place, i in pairing.additions.items() if i < finetuned_rows}
    output_rows = max(target_rows, max(added, default=-1) + 1)
    if output_rows - target_rows > sum(place >= target_rows for place in added):
        first = min(added)
        raise VocabularyError(
            "the target",
            f"has {target_rows} rows where its tokenizer has {first} tokens, so there is no row "
            f"below that of the added token {pairing.names[first]!r}",
            "resize the target's embeddings to its tokenizer first",
        )
    return added, output_rows


def _check_lost(base_pairing: BasePairing, finetuned_rows: int, base_rows: int) -> None:
    beyond = base_pairing.base_ids[finetuned_rows:]
    lost = np.flatnonzero((beyond >= 0) & (beyond < base_rows)) + finetuned_rows
    if lost.size:
        raise VocabularyError(
            "finetuned",
            f"has {finetuned_rows} rows and base {base_rows}, so {lost.size} tokens that both "
            f"tokenizers have are without a row in finetuned (the first is id {lost[0]})",
            "give finetuned the tokenizer that it was resized to",
        )


def _same_rows(counts: Mapping[str, int]) -> None:
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {role}" for role, count in counts.items())
        raise VocabularyError(
            "the vocabulary's rows",
            f"{found}, and no tokenizer says which belong together",
            "put the tokenizers' files beside the weights",
        )


def _fit(ids: Ids, size: int) -> Ids:
    """A copy of that size, cut or filled with `NONE`."""
    fitted = np.full(size, NONE, dtype=np.int64)
    count = min(size, len(ids))
    fitted[:count] = ids[:count]
    return fitted


def _runs(kind: Ids, *inputs: Ids) -> list[Run]:
    """Rows that continue each other, in every input, become one run."""
    if not len(kind):
        return []
    same = kind[1:] == kind[:-1]
    for rows in inputs:
        before, after = rows[:-1], rows[1:]
        same &= np.where(before < 0, after == before, after == before + 1)
    starts = np.flatnonzero(np.append(True, ~same))
    counts = np.diff(starts, append=len(kind))
    columns = zip(*(rows[starts].tolist() for rows in inputs), strict=True)
    cut = zip(kind[starts].tolist(), starts.tolist(), counts.tolist(), columns, strict=True)
    return [Run(_KINDS[k], start, count, rows) for k, start, count, rows in cut]
