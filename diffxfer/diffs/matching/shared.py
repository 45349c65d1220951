"""Shared tensors: one role stores a tensor several times, another role stores it once.

T5 and BART share one embedding between encoder, decoder and head. Some files store it under every
name, others under one. Equal bytes under several names are one tensor. Unequal bytes are an error,
because a role that stores one tensor for all names cannot hold them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.files import same_values
from diffxfer.diffs.matching.names import canonical, is_head
from diffxfer.errors import MatchError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from typing import TypeAlias

    from diffxfer.checkpoints.stored import StoredTensor

    Stored: TypeAlias = Mapping[str, tuple[StoredTensor, ...]]
    """Tensors by name; for a difference, those of finetuned and base."""
    Roles: TypeAlias = tuple[str, str]
    Shares: TypeAlias = tuple[dict[str, str], dict[str, str]]

_ONE_EMBEDDING = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)
"""The names of the shared embedding in an encoder-decoder, without the model's prefix."""


def part_copies(ours: Stored, theirs: Stored, pairs: dict[str, str], roles: Roles) -> None:
    """Remove pairs of tensors that one role stores as copies of a single tensor.

    `share` then pairs them as copies.

    Args:
        ours: the first role's tensors whose rows belong to tokens.
        theirs: the second role's.
        pairs: the pairs, as for `share`; pairs of copies are removed.
        roles: the two roles, for messages.

    Raises:
        MatchError: if the other role's tensors are not copies.
    """
    first = next((n for key in _ONE_EMBEDDING for n in pairs if canonical(n) == key), None)
    if first is None or first not in ours:
        return
    for name in [name for name in ours if name in pairs and name != first]:
        family = canonical(name) in _ONE_EMBEDDING or _is_its_head(name, first)
        if not family or not _equal(ours[name], ours[first]):
            continue
        one, other = (theirs.get(pairs[n]) for n in (name, first))
        if one and other and not _equal(one, other):
            raise _unequal(pairs[name], pairs[first], roles[::-1])
        del pairs[name]


def _is_its_head(name: str, embedding: str) -> bool:
    """Whether this is the head of an encoder-decoder; `ties` handles other models' heads."""
    return is_head(name) and canonical(embedding) == _ONE_EMBEDDING[0]


def share(ours: Stored, theirs: Stored, pairs: dict[str, str], roles: Roles) -> Shares:
    """Pair the copies of a tensor in one role with the single tensor in the other.

    Only tensors whose rows belong to tokens are considered. Models share these, and they are equal
    only if they are shared; two norms, by contrast, may be equal by chance.

    Args:
        ours: the first role's tensors whose rows belong to tokens.
        theirs: the second role's.
        pairs: the second role's name for each paired name of the first; pairs found here are
            added.
        roles: the two roles, for messages.

    Returns:
        For each role, the names of copies, each with the name of the original.

    Raises:
        MatchError: if a tensor that must be a copy holds other values.
    """
    taken = set(pairs.values())
    lonely = [name for name in ours if name not in pairs], [n for n in theirs if n not in taken]
    if not any(lonely):
        return {}, {}
    _pair_one_embedding((ours, theirs), lonely, pairs)
    back = {other: name for name, other in pairs.items() if other in theirs and name in ours}
    there = {name: theirs[other] for other, name in back.items()}
    here = {other: ours[name] for other, name in back.items()}
    return (
        _copies(roles, ours, [name for name in ours if name in pairs], there),
        _copies(roles[::-1], theirs, [n for n in theirs if n in set(pairs.values())], here),
    )


def _pair_one_embedding(
    stored: tuple[Stored, Stored], lonely: tuple[list[str], list[str]], pairs: dict[str, str]
) -> None:
    """Pair the embedding of an encoder-decoder if the roles store it under different names."""
    if any(canonical(name) in _ONE_EMBEDDING for name in pairs):
        return
    known = [_embeddings(names) for names in lonely]
    firsts = [
        names[0]
        for names, tensors in zip(known, stored, strict=True)
        if names and all(_equal(tensors[names[0]], tensors[name]) for name in _embeddings(tensors))
    ]
    if len(firsts) == 2:
        pairs[firsts[0]] = firsts[1]


def _embeddings(names: Iterable[str]) -> list[str]:
    return [name for name in names if canonical(name) in _ONE_EMBEDDING]


def _copies(
    roles: Roles, tensors: Stored, paired: Collection[str], counterparts: Stored
) -> dict[str, str]:
    copies: dict[str, str] = {}
    for name in sorted(tensors.keys() - set(paired)):
        shape = tensors[name][0].shape
        alike = [known for known in paired if tensors[known][0].shape == shape]
        equal = [known for known in alike if _equal(tensors[name], tensors[known])]
        if equal:
            _refuse_several(roles, name, [k for k in equal if k in counterparts], counterparts)
            copies[name] = equal[0]
        elif known := _one_embedding(name, alike):
            raise _unequal(name, known, roles)
    return copies


def _unequal(name: str, known: str, roles: Roles) -> MatchError:
    return MatchError(
        (),
        f"{name} and {known} have different values in {roles[0]}, but {roles[1]} stores one tensor"
        " for both",
        "use models that all store one tensor for both, or that all store two",
    )


def _refuse_several(
    roles: tuple[str, str], name: str, equal: list[str], counterparts: Stored
) -> None:
    """Refuse a tensor that is a copy of several tensors that differ in the other role."""
    first = counterparts[equal[0]] if equal else ()
    odd = next((k for k in equal[1:] if not _equal(first, counterparts[k])), None)
    if odd is not None:
        raise MatchError(
            (),
            f"{name} equals {equal[0]} and {odd} in {roles[0]}, but these two differ in {roles[1]}",
            "use models that all store it once, or that all store it several times",
        )


def _equal(ours: Iterable[StoredTensor], theirs: Iterable[StoredTensor]) -> bool:
    return all(same_values(one, other) for one, other in zip(ours, theirs, strict=True))


def _one_embedding(name: str, others: Iterable[str]) -> str | None:
    if canonical(name) not in _ONE_EMBEDDING:
        return None
    return next((other for other in others if canonical(other) in _ONE_EMBEDDING), None)
