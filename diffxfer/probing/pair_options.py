"""How models pair: the options of `transfer` that say so, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.added import check_added
from diffxfer.diffs.matching.rename import Rename, parse_renames
from diffxfer.diffs.matching.selection import Selection, make_selection
from diffxfer.diffs.vocab.pair_base import check_mode

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How models pair: the options of `transfer`.

    Attributes:
        selection: the tensors that take part, and those that a model may lack.
        added: what to do with a head that fine-tuning added.
        renames: new names under which a model's tensors are paired.
        vocab: how rows of tokens pair.
    """

    selection: Selection
    added: str
    renames: tuple[Rename, ...]
    vocab: str


def pair_options(
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    added: str = "refuse",
    rename: Sequence[str] = (),
    vocab: str = "auto",
    direct: bool = False,
) -> PairOptions:
    """Check the options of `probe` that say how models pair.

    Args:
        include: patterns of the target's names of tensors that take part.
        exclude: patterns of names that do not.
        allow_missing: patterns of names that a model may lack.
        added: ``"bring"``, ``"drop"`` or ``"refuse"``.
        rename: ``"ROLE:REGEX=TEXT"``.
        vocab: ``"auto"``, ``"ids"`` or ``"tokens"``.
        direct: whether there is a fourth model, so that `rename` may name it.

    Raises:
        OptionError: if a value is invalid.
    """
    check_mode(vocab)
    check_added(added)
    roles = ("finetuned", "base", "target", *(("direct",) if direct else ()))
    selection = make_selection(include=include, exclude=exclude, allow_missing=allow_missing)
    return PairOptions(selection, added, parse_renames(rename, roles), vocab)
