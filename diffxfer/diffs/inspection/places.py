"""Where tensors stand in a model, by their names alone: which layer, and which kind of module.

No table of architectures: the first number in a name that a module follows is a layer's, and a
module is called by as much of the end of its name as tells it from the others of its layer.
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
"""So many parts of a name are tried to tell it from the others; beyond, it is called by all."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a tensor stands.

    Attributes:
        stack: what the layers are called that it is in one of, such as ``"layers"`` or
            ``"vision_tower.encoder.layers"``; empty outside of any.
        layer: which of them, −1 outside of any.
        kind: what kind of module it belongs to, such as ``"q"``, ``"norms"`` or ``"embedding"``.
    """

    stack: str
    layer: int
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where each of a model's tensors stands.

    Args:
        names: all of them, as they are on disk.
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
    """A name as stack, layer and module, without numbers and without the parameter's own name."""
    module = parts[:-1] if parts[-1] in _PARAMETERS and len(parts) > 1 else parts
    for at, part in enumerate(module[:-1]):
        if part.isdecimal() and (stack := ".".join(parts[:at])):
            # A longer number is no layer's, and int() would take its time over it.
            return stack, int(part[-9:]), _named(module[at + 1 :])
    return "", -1, _named(module)


def _named(parts: list[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if not part.isdecimal()) or tuple(parts)


def _kinds(modules: set[tuple[str, ...]], *, in_layer: bool) -> dict[tuple[str, ...], str]:
    """What each module of a layer is called, so that no two that differ have one name."""
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
    # `gate_proj` beside a router that is called `gate` keeps its whole name.
    return kinds | {module: name for module, name in short.items() if counts[name] == 1 and name}


def _known(module: tuple[str, ...], *, in_layer: bool) -> str:
    """Kinds that gather modules of several names; empty for a module that stands for itself."""
    if any(map(_EXPERT.search, module)):
        return "experts"
    if any(map(_NORM.search, module)):
        return "norms"
    if in_layer:
        return ""
    if any(map(_HEAD.search, module)):
        return "head"
    return "embedding" if any(map(_EMBEDDING.search, module)) else ""
