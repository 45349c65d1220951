"""Pairing the vocabularies of roles, including roles without a tokenizer."""

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
    """The tokens of a difference.

    Attributes:
        tokenizer: finetuned's tokenizer; None if no role has one.
        added: finetuned's id to token, for tokens that base lacks.
        renamed: finetuned's id to base's token, for slots that finetuned renamed.
        base_pairing: how finetuned's rows pair with base's; None for a diff vector, whose rows
            are already paired, and if there are no tokenizers.
        base_fingerprint: the fingerprint of base's token table.
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
        """How finetuned's rows pair with base's: ``"ids"``, ``"tokens"``, or ``"rows"`` for all."""
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
        finetuned: finetuned's tokenizer, if it has one.
        base: base's tokenizer, if it has one.
        mode: ``"auto"``, ``"ids"`` or ``"tokens"``.
        same_rows: whether all their vocabulary tensors have equal row counts.
        rows: the row counts of finetuned and base, if finetuned has more than base.

    Returns:
        The difference's tokens.

    Raises:
        VocabularyError: if one has no tokenizer and the row counts differ.
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
        vocabulary: the difference's tokens.
        target: the target's tokenizer, if it has one.
        mode: ``"auto"``, ``"ids"`` or ``"tokens"``.
        same_rows: whether the vocabulary tensors have equal row counts on both sides.

    Returns:
        The pairing, None if no role has a tokenizer; and warnings.

    Raises:
        VocabularyError: if one has no tokenizer and the row counts differ.
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
            f"has no tokenizer, and its vocabulary has more or fewer rows than that of {other}",
            "add its tokenizer files beside its weights",
        )
    return f"{lacking} has no tokenizer, so that of {other} is used"
