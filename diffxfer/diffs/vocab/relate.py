"""From tokenizers of whole roles to pairings, also where a role has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.vocab.pair_base import BasePairing, pair_with_base
from diffxfer.diffs.vocab.pair_target import TargetPairing, pair_with_target
from diffxfer.errors import VocabularyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.diffs.vocab.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of the tokens of a difference.

    Attributes:
        tokenizer: finetuned's; None where no role has one.
        added: finetuned's id and token, of those that base lacks.
        renamed: finetuned's id and base's token, of slots that finetuned renamed.
        base_pairing: how finetuned's rows pair with base's; None for a diff vector, whose rows
            are paired already, and where there are no tokenizers.
        base_fingerprint: of base's token table.
        warnings: what a user should know.
    """

    tokenizer: Tokenizer | None
    added: Mapping[int, str]
    renamed: Mapping[int, str]
    base_pairing: BasePairing | None
    base_fingerprint: str
    warnings: tuple[str, ...] = ()

    @property
    def pairing_mode(self) -> str:
        """How finetuned's rows pair with base's: ``"ids"``, ``"tokens"``, or all ``"rows"``."""
        return self.base_pairing.mode if self.base_pairing else "rows"


def relate_to_base(
    finetuned: Tokenizer | None,
    base: Tokenizer | None,
    mode: str,
    *,
    same_rows: bool,
    rows: tuple[int, int] | None = None,
) -> Vocabulary:
    """Relate finetuned's tokens to base's.

    Args:
        finetuned: its tokenizer, if it has one.
        base: likewise.
        mode: ``"auto"``, ``"ids"`` or ``"tokens"``.
        same_rows: whether all their vocabulary tensors have the same rows.
        rows: how many finetuned and base have, where finetuned has more than base.

    Returns:
        What is known of them.

    Raises:
        VocabularyError: if one has no tokenizer and the rows do not tell.
    """
    if finetuned is None and base is None:
        return Vocabulary(None, {}, {}, None, "")
    warnings: tuple[str, ...] = ()
    if finetuned is None or base is None:
        lacking, other = ("finetuned", "base") if finetuned is None else ("base", "finetuned")
        warnings = (_assume(lacking, other, same_rows=same_rows),)
    ours, theirs = finetuned or base, base or finetuned
    assert ours is not None
    assert theirs is not None
    pairing = pair_with_base(ours, theirs, mode, rows=rows)
    return Vocabulary(
        ours,
        pairing.added,
        pairing.renamed,
        pairing,
        theirs.fingerprint,
        (*warnings, *pairing.warnings),
    )


def relate_to_target(
    vocabulary: Vocabulary, target: Tokenizer | None, mode: str, *, same_rows: bool
) -> tuple[TargetPairing | None, tuple[str, ...]]:
    """Relate a difference's tokens to the target's.

    Args:
        vocabulary: of the difference.
        target: its tokenizer, if it has one.
        mode: ``"auto"``, ``"ids"`` or ``"tokens"``.
        same_rows: whether the vocabulary tensors have the same rows on both sides.

    Returns:
        The pairing, None where no role has a tokenizer; and warnings.

    Raises:
        VocabularyError: if one has no tokenizer and the rows do not tell.
    """
    finetuned = vocabulary.tokenizer
    if finetuned is None and target is None:
        return None, ()
    warnings: tuple[str, ...] = ()
    if finetuned is None or target is None:
        names = ("finetuned", "the target") if finetuned is None else ("the target", "finetuned")
        warnings = (_assume(*names, same_rows=same_rows),)
    ours, theirs = finetuned or target, target or finetuned
    assert ours is not None
    assert theirs is not None
    pairing = pair_with_target(ours, vocabulary.added, vocabulary.renamed, theirs, mode)
    return pairing, (*warnings, *pairing.warnings)


def _assume(lacking: str, other: str, *, same_rows: bool) -> str:
    if not same_rows:
        raise VocabularyError(
            lacking,
            f"has no tokenizer, and its vocabulary has another number of rows than that of {other}",
            "put its tokenizer's files beside its weights",
        )
    return f"{lacking} has no tokenizer: it is taken to have that of {other}"
