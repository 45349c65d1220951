"""A role that is a part of another one: a text tower of a multimodal model, a thinker of an omni.

The part is told from the names and shapes alone: one prefix, added to the names of the one role,
gives names of the other. What the whole model has beside the part is left alone.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import (
    canonical,
    is_head_name,
    is_in_block,
    is_known_vocabulary,
    pair_names,
)
from diffxfer.errors import MatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from typing import TypeAlias

    Shapes: TypeAlias = Mapping[str, tuple[int, ...] | None]
    """The shape of each tensor by its name; None where it is not known."""

_STACK = re.compile(r"(?:^|\.)\d+(?:\.|\Z)")
_DEEP = 2
"""How many modules lead to a weight within a tower's layer: ``self_attn.q_proj.weight``."""


def pair_tensors(reference: Shapes, other: Shapes, roles: tuple[str, str]) -> dict[str, str]:
    """Pair the tensors of two roles by name, one of which may be a part of the other.

    Args:
        reference: the one.
        other: the other.
        roles: what the two are, for messages.

    Returns:
        A name of `other` for each name of `reference` that has one.

    Raises:
        MatchError: if names can be paired in two ways.
    """
    pairs = pair_names(reference.keys(), other.keys(), roles)
    if len(pairs) in (len(reference), len(other)):
        return pairs
    taken = set(pairs.values())
    ours = {name: shape for name, shape in reference.items() if name not in pairs}
    theirs = {name: shape for name, shape in other.items() if name not in taken}
    # A part has no layer that is paired already.
    if not any(map(is_in_block, pairs)):
        added = _with_prefix(ours, theirs, roles)
        if not added:
            swapped = _with_prefix(theirs, ours, (roles[1], roles[0]))
            added = {ours: theirs for theirs, ours in swapped.items()}
        pairs |= added
    return pairs


def _with_prefix(part: Shapes, whole: Shapes, roles: tuple[str, str]) -> dict[str, str]:
    """Pair a part with what the whole has under one prefix, if there is exactly one that fits."""
    blocks = [name for name in part if is_in_block(name)]
    if not blocks:
        return {}
    anchor = max(blocks, key=len)
    for shorten in (str, canonical):
        ending = f".{shorten(anchor)}"
        prefixes = [name[: 1 - len(ending)] for name in whole if name.endswith(ending)]
        fits = [p for p in prefixes if _fits(p, blocks, part, whole, shorten)]
        if len(fits) > 1:
            raise _two_prefixes(fits, roles)
        if fits:
            renamed = {name: fits[0] + shorten(name) for name in part}
            return {name: new for name, new in renamed.items() if new in whole}
    return {}


def _fits(
    prefix: str, blocks: Iterable[str], part: Shapes, whole: Shapes, shorten: Callable[[str], str]
) -> bool:
    for name in blocks:
        new = prefix + shorten(name)
        if new not in whole:
            return False
        shapes = part[name], whole[new]
        if None not in shapes and shapes[0] != shapes[1]:
            return False
    return True


def _two_prefixes(prefixes: list[str], roles: tuple[str, str]) -> MatchError:
    part, whole = (role.removeprefix("the ") for role in roles)
    named = " and ".join(prefix.rstrip(".") for prefix in sorted(prefixes))
    return MatchError(
        (),
        f"the layers of {part} fit {len(prefixes)} parts of {whole}: {named}",
        f"say which with --rename '{part}:^={min(prefixes)}'",
    )


def stack_of(name: str) -> str:
    """What a name begins with up to the number of its layer: ``model.layers``; "" without one."""
    found = _STACK.search(name)
    return name[: found.start()] if found else ""


def body_of(names: Iterable[str]) -> str:
    """The module that holds the layers and norms of some tensors, as ``model``; "" for none.

    Args:
        names: tensors of a model; its embeddings and heads do not count.
    """
    inner = [name for name in names if not is_known_vocabulary(name) and not is_head_name(name)]
    stacks = {stack_of(name) for name in inner if is_in_block(name)}
    if not stacks:
        return ""
    first, last = (text.split(".") for text in (min(inner), max(inner)))
    common = []
    for one, other in zip(first[:-1], last[:-1], strict=False):
        if one != other or one.isdigit():
            break
        common.append(one)
    if ".".join(common) in stacks:
        common.pop()
    return ".".join(common)


def is_under(name: str, module: str) -> bool:
    """Whether a tensor is in a module, or in one inside it; nothing is in the module ""."""
    return name.startswith(f"{module}.")


def towers_of(paired: Collection[str], unpaired: Collection[str]) -> frozenset[str]:
    """The modules with whole stacks of layers that have no counterpart, as a vision tower.

    Args:
        paired: names of a model that another role has too.
        unpaired: its other names.
    """
    layers = {stack_of(name) for name in unpaired if _is_in_layer(name)} - {""}
    if layers:
        layers -= {stack_of(name) for name in paired}
    if not layers:
        return frozenset()
    shared = {module for name in paired for module in _around(name)}
    return frozenset(
        next((m for m in _around(f"{stack}.") if m not in shared), stack) for stack in layers
    )


def _around(name: str) -> list[str]:
    """The modules that a tensor is in, the outermost first."""
    segments = name.split(".")
    return [".".join(segments[:end]) for end in range(1, len(segments))]


def is_in_tower(name: str, towers: Collection[str]) -> bool:
    """Whether a tensor is in one of the modules that `towers_of` found."""
    return any(is_under(name, tower) for tower in towers)


def outside_part(paired: Collection[str], unpaired: Collection[str]) -> frozenset[str]:
    """The tensors of a whole model that lie outside of the part that another role is.

    There are some only where whole towers of layers have no counterpart and others have one, in a
    module of their own: a model that lacks single layers, a norm or a head is no part.

    Args:
        paired: names of the whole model that the other role has too.
        unpaired: its other names.
    """
    body = body_of(paired)
    towers = towers_of(paired, unpaired) if body else ()
    if not towers:
        return frozenset()
    # What lies beside a part's layers belongs to it, unless it is the head of a decoder.
    decoder = any(map(_names_decoder, towers)) and not _names_decoder(body)
    around = {*_around(f"{body}.")}
    shared = {module for name in paired for module in _around(name)} - around
    return frozenset(
        name
        for name in unpaired
        if not is_under(name, body)
        and not _is_own(name, body, decoder=decoder)
        # A norm that stands beside a paired embedding is missing, wherever the layers are.
        and next((m for m in _around(name) if m not in around), "") not in shared
    )


def _is_in_layer(name: str) -> bool:
    """Whether a tensor is in a layer that has modules in modules, as no head's layers have."""
    found = _STACK.search(name)
    deep = found is not None and name.count(".", found.end()) >= _DEEP
    return deep and not is_head_name(name)


def _names_decoder(module: str) -> bool:
    return "decoder" in module


def _is_own(name: str, body: str, *, decoder: bool) -> bool:
    """Whether a tensor beside a body is its head or embedding, and not another model's."""
    segments, around = name.split("."), body.split(".")
    alike = (one == other for one, other in zip(segments, around, strict=False))
    shared = sum(takewhile(bool, alike))
    rest = ".".join(segments[shared:])
    if is_head_name(segments[shared]):
        return not decoder
    return is_known_vocabulary(rest) and rest.count(".") == 1
