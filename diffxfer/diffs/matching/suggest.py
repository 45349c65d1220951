"""Finding `--rename` options that would pair tensors that one role names differently."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from diffxfer.errors import Culprits

_MOST_OPTIONS = 4
_TRIED = 400
"""The most names to derive substitutions from; layers have the same names, so these suffice."""
_NUMBER = re.compile(r"\d+")
_SHAPE = re.compile(r"\([\d, ]*\)$")


def suggest_renames(groups: Sequence[Culprits]) -> str | None:
    """The options that would pair most tensors of a role that names them differently.

    Args:
        groups: the tensors that cannot be matched, grouped.

    Returns:
        The remedy, with options ready to paste; None if a few options cannot pair most tensors.
    """
    by_holders: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for group in groups:
        if group.found == "nothing":
            by_holders[group.holders] |= dict.fromkeys(group.names, _shape(group.expected))
    for odd, others in _sides(by_holders.keys()):
        ours = by_holders[odd]
        theirs = {name: shape for holders in others for name, shape in by_holders[holders].items()}
        renames, paired = _greedy(ours, theirs)
        if 2 * paired > len(ours):
            role = _role(odd)
            options = " ".join(f"--rename '{role}:{old}={new}'" for old, new in renames)
            return f"if these are the same tensors, {options} pairs {paired} of the {len(ours)}"
    return None


def _sides(
    holders: Iterable[tuple[str, ...]],
) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """The holders that may be renamed, each with the holders that may have the same tensors."""
    known = list(holders)
    found = []
    for odd in sorted(known, key=lambda each: (len(each), each != ("finetuned",))):
        others = [each for each in known if not set(each) & set(odd)]
        if others and _role(odd):
            found.append((odd, others))
    return found


def _role(holders: tuple[str, ...]) -> str:
    return holders[0] if len(holders) == 1 and holders[0] != "diff vector" else ""


def _shape(expected: str) -> str:
    found = _SHAPE.search(expected)
    return found[0] if found else expected


def _greedy(
    ours: Mapping[str, str], theirs: Mapping[str, str]
) -> tuple[list[tuple[str, str]], int]:
    """A few greedy substitutions, each pairing the most remaining names; and the number paired."""
    renames: list[tuple[str, str]] = []
    names = dict(zip(ours, ours, strict=True))
    for _ in range(_MOST_OPTIONS):
        rest = {old: new for old, new in names.items() if not _fits(old, new, ours, theirs)}
        best = _best(rest, ours, theirs)
        if best is None:
            break
        renames.append(best)
        names = {old: re.sub(best[0], best[1], new) for old, new in names.items()}
    return renames, sum(_fits(old, new, ours, theirs) for old, new in names.items())


def _fits(old: str, new: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    return theirs.get(new) == ours[old]


def _best(
    rest: Mapping[str, str], ours: Mapping[str, str], theirs: Mapping[str, str]
) -> tuple[str, str] | None:
    """The substitution that pairs the most names, or else the one that applies to the most names.

    The second case helps names that differ in two places: they pair only after two substitutions.
    """
    candidates: Counter[tuple[str, str]] = Counter()
    places = _by_place(theirs)
    tried = list(rest.items())[:_TRIED]
    for old, new in tried:
        found = places[ours[old], tuple(_NUMBER.findall(old))]
        candidates.update({s for other in found if (s := _substitution(new, other)) is not None})
    scored = []
    for (pattern, text), count in candidates.most_common(20):
        changed = {old: re.sub(pattern, text, new) for old, new in rest.items()}
        fitting = sum(_fits(old, new, ours, theirs) for old, new in changed.items())
        if fitting or 4 * count > len(tried):
            scored.append((fitting, count, (pattern, text)))
    return max(scored)[-1] if scored else None


def _by_place(names: Mapping[str, str]) -> Mapping[tuple[str, tuple[str, ...]], list[str]]:
    places: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name, shape in names.items():
        places[shape, tuple(_NUMBER.findall(name))].append(name)
    return places


def _before_number(segments: list[str]) -> list[str]:
    return list(takewhile(lambda segment: not segment.isdigit(), segments))


def _substitution(ours: str, theirs: str) -> tuple[str, str] | None:
    """The run of segments that must change, as a pattern and its replacement."""
    one, other = ours.split("."), theirs.split(".")
    begin = 0
    while begin < min(len(one), len(other)) and one[begin] == other[begin]:
        begin += 1
    end = 0
    while end < min(len(one), len(other)) - begin and one[-1 - end] == other[-1 - end]:
        end += 1
    old, new = one[begin : len(one) - end], other[begin : len(other) - end]
    if any(segment.isdigit() for segment in (*old, *new)):
        # More than one run differs: start with the first, up to the layer's number.
        old, new, end = _before_number(old), _before_number(new), 1
    if old == new:
        return None
    if not old and begin and not one[begin - 1].isdigit():
        # To insert a module, anchor it to the enclosing module, or else to the enclosed one.
        begin, old, new = begin - 1, one[begin - 1 : begin], [one[begin - 1], *new]
    elif not old and begin and begin < len(one):
        end, old, new = len(one) - begin - 1, one[begin : begin + 1], [*new, one[begin]]
    if begin == 0:
        pattern = "^" + "".join(re.escape(f"{segment}.") for segment in old)
        return (pattern, "".join(f"{segment}." for segment in new)) if end else None
    if not old:
        return None
    tail = r"\." if end else "$"
    text = "." + "".join(f"{segment}." for segment in new)
    return (
        rf"\.{re.escape('.'.join(old))}{tail}",
        text if end else text.rstrip("."),
    )
