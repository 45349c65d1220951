"""Pairing vocabularies: which rows of embeddings and heads belong together.

There are two steps, because a diff vector is applied without its base. `pair_with_base` pairs each
row of finetuned with the row of base that is subtracted from it; `pair_with_target`, in
`pair_target`, pairs that difference with the target's row that it is added to. Both use token ids
only; `rows` turns ids into runs of rows.

**ids**: rows pair by position if the tokenizers agree, id by id, on every regular token, and on
every special token that finetuned uses (in a chat template, or as bos, eos or pad). Special tokens
that finetuned does not use may have different names: Llama 3.1 renamed reserved slots of Llama 3.0.

**tokens**: otherwise rows pair by token string.

In both modes, these tokens are special cases:

- *added*: base has no such token, nor a special slot at that id that finetuned renamed; or base's
  tokenizer has the token, but its embedding has no row for it. Finetuned's row is brought whole. If
  the target has the token, the target's row is kept, if there is one; otherwise the token is
  appended after the target's last token, in the order of finetuned's ids.
- *renamed*: base has a special slot at that id under a different name (ChatML on a reserved token).
  It pairs with the target's slot at that id if that has base's or finetuned's name, otherwise with
  the slot that has base's name (which makes the mode ``tokens``); the output's tokenizer gets
  finetuned's name. If the target has finetuned's name at a different id, the target's row is kept,
  as for an added token.
- *dropped*: the target has no place for the token. Its difference is lost; if finetuned uses the
  token, that is an error.
- *duplicate*: a string that a tokenizer has twice: the first pairs with the first, the second with
  the second.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from diffxfer.diffs.vocab.tokens import Tokenizer

    Ids: TypeAlias = NDArray[np.int64]
    Pairs: TypeAlias = tuple[Ids, Ids]

ADDED = -1
"""Replaces a base id: base has no such token."""
NONE = -2
"""Replaces an id: this row has no counterpart."""

_MODES = ("auto", "ids", "tokens")


@dataclass(frozen=True, slots=True, eq=False)
class BasePairing:
    """The row of base that is subtracted from each row of finetuned.

    Attributes:
        mode: ``"ids"`` or ``"tokens"``.
        base_ids: by finetuned id, shape ``(finetuned tokens,)``: the base id, `ADDED`, or `NONE`.
        added: finetuned id to token, for tokens that finetuned added.
        renamed: finetuned id to base's name of that slot, for slots that finetuned renamed.
        base_tokens: the size of base's tokenizer; base's rows beyond it are padding.
        warnings: what a user should know.
    """

    mode: str
    base_ids: Ids
    added: Mapping[int, str]
    renamed: Mapping[int, str]
    base_tokens: int
    warnings: tuple[str, ...] = ()

    @property
    def in_place(self) -> bool:
        """Whether every token that both have has the same id in both."""
        ids = self.base_ids
        return not ((ids >= 0) & (ids != np.arange(len(ids)))).any()


def pair_with_base(
    finetuned: Tokenizer,
    base: Tokenizer,
    mode: str = "auto",
    *,
    rows: tuple[int, int] | None = None,
) -> BasePairing:
    """Pair finetuned's tokens with base's; the module's docstring has the rules.

    Args:
        finetuned: finetuned's tokenizer.
        base: base's tokenizer.
        mode: ``"auto"``, ``"tokens"``, or ``"ids"``: every id that both have pairs by position.
        rows: the row counts of finetuned and base, if finetuned has more than base.

    Returns:
        The pairing.

    Raises:
        OptionError: there is no such mode.
    """
    check_mode(mode)
    apart = differing_ids(finetuned, base)
    known = set(base.tokens)
    new = {i for i in apart if finetuned.tokens[i] not in known}
    slots = sorted(new & base.special)
    renamed = {i: name for i in slots if (name := token_at(base, i)) is not None}
    if mode == "auto":
        unlike = (i for i in apart if i not in new or token_at(base, i) is not None)
        same = all(i in renamed or is_harmless(i, finetuned, base) for i in unlike)
        mode = "ids" if same else "tokens"
    base_ids = np.full(len(finetuned.tokens), NONE, dtype=np.int64)
    if mode == "ids":
        sources, places = pair_by_position(finetuned, base)
    else:
        sources, places = pair_by_string(finetuned, base)
        # At a different id only its name identifies a slot: it must be special in both, and
        # finetuned must no longer have base's name.
        names = set(finetuned.tokens)
        renamed = {
            i: name for i, name in renamed.items() if name not in names and i in finetuned.special
        }
        base_ids[list(renamed)] = list(renamed)
    base_ids[sources] = places
    added = _absent(finetuned, base_ids, known)
    if rows is not None:
        added |= _without_row(finetuned, base_ids, *rows)
        renamed = {i: name for i, name in renamed.items() if i not in added}
    base_ids[list(added)] = ADDED
    base_ids.flags.writeable = False
    trusted = (i for i in apart if i not in renamed)
    warnings = unlike_tokens(trusted, finetuned, base, "base") if mode == "ids" else ()
    return BasePairing(mode, base_ids, added, renamed, len(base.tokens), warnings)


def _absent(finetuned: Tokenizer, base_ids: Ids, known: Collection[str | None]) -> dict[int, str]:
    """The unpaired tokens whose strings base lacks; a duplicate string counts once."""
    found: dict[str, int] = {}
    for i in np.flatnonzero(base_ids == NONE).tolist():
        token = finetuned.tokens[i]
        if token is not None and token not in known:
            found.setdefault(token, i)
    return {i: token for token, i in found.items()}


def _without_row(
    finetuned: Tokenizer, base_ids: Ids, finetuned_rows: int, base_rows: int
) -> dict[int, str]:
    """The tokens with a row in finetuned but none in base, except duplicate strings."""
    ids = np.flatnonzero(base_ids[:finetuned_rows] >= base_rows).tolist()
    if not ids:
        return {}
    counts = Counter(finetuned.tokens)
    tokens = ((i, finetuned.tokens[i]) for i in ids)
    return {i: token for i, token in tokens if token is not None and counts[token] == 1}


def check_mode(mode: str) -> None:
    """Refuse an unknown pairing mode.

    Raises:
        OptionError: there is no such mode.
    """
    if mode not in _MODES:
        raise OptionError("--vocab", f"{mode!r} is unknown", f"use one of {', '.join(_MODES)}")


def differing_ids(finetuned: Tokenizer, other: Tokenizer) -> list[int]:
    """The ids at which finetuned has a token and the other has a different one, or none."""
    if finetuned.fingerprint == other.fingerprint:
        return []
    pairs = zip_longest(finetuned.tokens, other.tokens[: len(finetuned.tokens)])
    return [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs and ours is not None]


def token_at(tokenizer: Tokenizer, i: int) -> str | None:
    """The token with that id; None for a hole or an id past the end."""
    return tokenizer.tokens[i] if i < len(tokenizer.tokens) else None


def is_harmless(i: int, finetuned: Tokenizer, other: Tokenizer) -> bool:
    """Whether the id is a special slot, or missing in the other, and finetuned does not use it."""
    special = i in finetuned.special and (i in other.special or token_at(other, i) is None)
    return special and not finetuned.matters(i)


def unlike_tokens(
    apart: Iterable[int], finetuned: Tokenizer, other: Tokenizer, role: str
) -> tuple[str, ...]:
    """A warning if regular tokens with different names were paired by position."""
    regular = [
        i
        for i in apart
        if token_at(other, i) is not None and not (i in finetuned.special and i in other.special)
    ]
    if not regular:
        return ()
    i = regular[0]
    return (
        f"paired by id, although {len(regular)} regular tokens differ between finetuned and {role} "
        f"(the first is id {i}: {finetuned.tokens[i]!r} and {other.tokens[i]!r})",
    )


def pair_by_position(finetuned: Tokenizer, other: Tokenizer) -> Pairs:
    """The ids at which both have a token."""
    pairs = zip(finetuned.tokens, other.tokens, strict=False)
    ids = np.flatnonzero([ours is not None and theirs is not None for ours, theirs in pairs])
    return ids, ids


def pair_by_string(finetuned: Tokenizer, other: Tokenizer) -> Pairs:
    """The ids of equal strings; duplicates pair in order, the first with the first."""
    keys = _keys(other.tokens)
    places = dict(zip(keys, range(len(keys)), strict=True))
    places.pop(None, None)
    found = [places.get(key, NONE) for key in _keys(finetuned.tokens)]
    ids = np.array(found, dtype=np.int64)
    sources = np.flatnonzero(ids != NONE)
    return sources, ids[sources]


def _keys(tokens: Sequence[str | None]) -> Sequence[str | tuple[str, int] | None]:
    """The tokens as unique keys: a repeated token gets a number."""
    if len(set(tokens)) == len(tokens):
        return tokens
    seen: dict[str | None, int] = {}
    keys: list[str | tuple[str, int] | None] = []
    for token in tokens:
        before = seen[token] = seen.get(token, -1) + 1
        keys.append((token, before) if before and token is not None else token)
    return keys
