"""A role that is a part of another: the text tower of a multimodal model, the thinker of an omni.

Names and shapes alone identify the part: one prefix, added to the names of one role, gives names of
the other. The rest of the whole model is not changed.
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
    """The shape of each tensor by name; None if it is not known."""

_STACK = re.compile(r"(?:^|\.)\d+(?:\.|\Z)")
_DEEP = 2
"""Depth of a weight's modules within a tower's layer: two in ``self_attn.q_proj.weight``."""


def pair_tensors(reference: Shapes, other: Shapes, roles: tuple[str, str]) -> dict[str, str]:
    """Pair the tensors of two roles by name; one role may be a part of the other.

    Args:
        reference: tensors of the first role.
        other: tensors of the second role.
        roles: the two roles, for messages.

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
    # If a layer is paired already, neither role is a part of the other.
    if not any(map(is_in_block, pairs)):
        added = _with_prefix(ours, theirs, roles)
        if not added:
            swapped = _with_prefix(theirs, ours, (roles[1], roles[0]))
            added = {ours: theirs for theirs, ours in swapped.items()}
        pairs |= added
    return pairs


def _with_prefix(part: Shapes, whole: Shapes, roles: tuple[str, str]) -> dict[str, str]:
    """Pair a part with the whole's tensors under one prefix, if exactly one prefix fits."""
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
        f"choose one, for example with --rename '{part}:^={min(prefixes)}'",
    )


def stack_of(name: str) -> str:
    """The part of a name before its layer's number, as ``model.layers``; "" without a number."""
    found = _STACK.search(name)
    return name[: found.start()] if found else ""


def body_of(names: Iterable[str]) -> str:
    """The module that holds the layers and norms of some tensors, as ``model``; "" for none.

    Args:
        names: a model's tensors; embeddings and heads are ignored.
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
    """Whether a tensor is in a module or its submodules; nothing is in the module ""."""
    return name.startswith(f"{module}.")


def towers_of(paired: Collection[str], unpaired: Collection[str]) -> frozenset[str]:
    """The modules whose whole stack of layers has no counterpart, such as a vision tower.

    Args:
        paired: a model's names that another role has too.
        unpaired: its other names.
    """
    layers = {stack_of(name) for name in unpaired if _is_in_layer(name)} - {""}
    if layers:
        layers -= {stack_of(name) for name in paired}
    if not layers:
        return frozenset()
    shared = {module for name in paired for module in modules_of(name)}
    return frozenset(
        next((m for m in modules_of(f"{stack}.") if m not in shared), stack) for stack in layers
    )


def modules_of(name: str) -> list[str]:
    """The modules that enclose a tensor, outermost first."""
    segments = name.split(".")
    return [".".join(segments[:end]) for end in range(1, len(segments))]


def is_in_tower(name: str, towers: Collection[str]) -> bool:
    """Whether a tensor is in one of the modules that `towers_of` found."""
    return any(is_under(name, tower) for tower in towers)


def outside_part(paired: Collection[str], unpaired: Collection[str]) -> frozenset[str]:
    """The tensors of a whole model outside the part that the other role stores.

    The other role counts as a part only if whole towers lack a counterpart while other layers, in
    a separate module, have one. A model that lacks single layers, a norm or a head is not a part.

    Args:
        paired: the whole model's names that the other role has too.
        unpaired: its other names.
    """
    body = body_of(paired)
    towers = towers_of(paired, unpaired) if body else ()
    if not towers:
        return frozenset()
    # Tensors beside a part's layers belong to the part, except a decoder's head.
    decoder = any(map(_names_decoder, towers)) and not _names_decoder(body)
    around = {*modules_of(f"{body}.")}
    shared = {module for name in paired for module in modules_of(name)} - around
    return frozenset(
        name
        for name in unpaired
        if not is_under(name, body)
        and not _is_own(name, body, decoder=decoder)
        # A norm beside a paired embedding belongs to the part, wherever the layers are.
        and next((m for m in modules_of(name) if m not in around), "") not in shared
    )


def _is_in_layer(name: str) -> bool:
    """Whether a tensor is in a layer with nested modules, which a head's layers do not have."""
    found = _STACK.search(name)
    deep = found is not None and name.count(".", found.end()) >= _DEEP
    return deep and not is_head_name(name)


def _names_decoder(module: str) -> bool:
    return "decoder" in module


def _is_own(name: str, body: str, *, decoder: bool) -> bool:
    """Whether a tensor beside a body is the body's own head or embedding."""
    segments, around = name.split("."), body.split(".")
    alike = (one == other for one, other in zip(segments, around, strict=False))
    shared = sum(takewhile(bool, alike))
    rest = ".".join(segments[shared:])
    if is_head_name(segments[shared]):
        return not decoder
    return is_known_vocabulary(rest) and rest.count(".") == 1
