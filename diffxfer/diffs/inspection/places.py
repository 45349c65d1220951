"""The place of tensors in a model, by their names alone: layer and kind of module.

There is no table of architectures. The first number in a name that is followed by a module is the
layer's. A module's kind is the shortest end of its name that is unique in its layer.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable

_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)", re.IGNORECASE)
_EXPERT = re.compile(r"(?:^|_)experts?(?:_|$)")
_EMBEDDING = re.compile(r"embed|^w[tp]e$|^shared$")
_HEAD = re.compile(r"(?:^|_)head(?:_|$)|^embed_out$")
_SUFFIX = re.compile(r"_proj(?:ection)?$")
_PARAMETERS = frozenset({"weight", "bias"})
_DEEPEST = 16
"""The most parts of a name to try as its kind; beyond that, the kind is the whole name."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The place of a tensor.

    Attributes:
        stack: the name of its stack of layers, such as ``"layers"`` or
            ``"vision_tower.encoder.layers"``; empty outside any stack.
        layer: the layer's number in the stack, −1 outside any stack.
        kind: the kind of its module, such as ``"q"``, ``"norms"`` or ``"embedding"``.
    """

    stack: str
    layer: int
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each of a model's tensors.

    Args:
        names: all names on disk.
    """
    found = {name: _split(canonical(name).split(".")) for name in names}
    modules: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for stack, _, module in found.values():
        modules[stack].add(module)
    kinds = {stack: _kinds(own, in_layer=bool(stack)) for stack, own in modules.items()}
    return {
        name: Place(stack, layer, kinds[stack][module])
        for name, (stack, layer, module) in found.items()
    }


def _split(parts: list[str]) -> tuple[str, int, tuple[str, ...]]:
    """Split a name into stack, layer and module, without numbers and the parameter's name."""
    module = parts[:-1] if parts[-1] in _PARAMETERS and len(parts) > 1 else parts
    for at, part in enumerate(module[:-1]):
        if part.isdecimal() and (stack := ".".join(parts[:at])):
            # A longer number is not a layer's, and int() would be slow.
            return stack, int(part[-9:]), _named(module[at + 1 :])
    return "", -1, _named(module)


def _named(parts: list[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if not part.isdecimal()) or tuple(parts)


def _kinds(modules: set[tuple[str, ...]], *, in_layer: bool) -> dict[tuple[str, ...], str]:
    """The kind of each module of a layer; different modules get different kinds."""
    kinds = {module: _known(module, in_layer=in_layer) for module in modules}
    rest = [module for module, kind in kinds.items() if not kind]
    ends: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for module in rest:
        for count in range(1, min(len(module), _DEEPEST) + 1):
            ends[module[-count:]] += 1
    for module in rest:
        lengths = range(1, min(len(module), _DEEPEST) + 1)
        count = next((count for count in lengths if ends[module[-count:]] == 1), len(module))
        kinds[module] = ".".join(module[-count:])
    short = {module: _SUFFIX.sub("", kinds[module]) for module in rest if "." not in kinds[module]}
    counts = Counter([*kinds.values(), *short.values()])
    # `gate_proj` keeps its whole name if a router in the layer is called `gate`.
    return kinds | {module: name for module, name in short.items() if counts[name] == 1 and name}


def _known(module: tuple[str, ...], *, in_layer: bool) -> str:
    """The kind that collects modules of several names; empty for any other module."""
    if any(map(_EXPERT.search, module)):
        return "experts"
    if any(map(_NORM.search, module)):
        return "norms"
    if in_layer:
        return ""
    if any(map(_HEAD.search, module)):
        return "head"
    return "embedding" if any(map(_EMBEDDING.search, module)) else ""
