"""Which tensors of a model hold its attention heads and MLP units, and along which axis."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from diffxfer.models.source import ModelSource

    Section: TypeAlias = tuple[Literal["query", "key", "unit"], int]
    """Heads or units that follow each other along an axis, and how many places each has."""
    Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a layer.

    Attributes:
        queries: the number of query heads.
        keys: the number of key and value heads; query heads are grouped by them, in order.
        size: the places of a head.
    """

    queries: int
    keys: int
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's axis, along which heads or units are permuted.

    Attributes:
        axis: the axis.
        sections: what lies along it, in order.
    """

    axis: int
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors that are permuted together: of the attention, or the MLP, of one layer.

    Attributes:
        name: the beginning of their names.
        axes: the heads, or the number of units.
        parts: each permuted tensor's name and axis.
    """

    name: str
    axes: Heads | int
    parts: tuple[tuple[str, Part], ...]


_Heading: TypeAlias = "tuple[re.Pattern[str], Mapping[str, str], frozenset[str]]"

_BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")
_PROJECTIONS = {
    **{f"{name}_proj.{kind}": "key" for name in "kv" for kind in ("weight", "bias")},
    **{f"q_proj.{kind}": "query" for kind in ("weight", "bias")},
    **{f"qkv_proj.{kind}": "in turn" for kind in ("weight", "bias")},
    **{f"{name}.weight": "out" for name in ("o_proj", "out_proj")},
    **{f"q_{name}.weight": "query norm" for name in ("norm", "layernorm")},
    **{f"k_{name}.weight": "key norm" for name in ("norm", "layernorm")},
    "sinks": "one each",
}
_SELF = {
    **{f"self.{name}.{kind}": "key" for name in ("key", "value") for kind in ("weight", "bias")},
    **{f"self.query.{kind}": "query" for kind in ("weight", "bias")},
    "output.dense.weight": "out",
}
_CONV1D = {"c_attn.weight": "last", "c_attn.bias": "last", "c_proj.weight": "first"}
_NEOX = {"query_key_value.weight": "mixed", "query_key_value.bias": "mixed", "dense.weight": "out"}
_NORM = ("weight", "bias", "gamma", "beta")

# The attention of a layer: how the names of its tensors begin, how those of permuted tensors end
# and their role, and how those end that a permutation does not touch. A tensor with any other end
# may depend on the order of heads, so the heads of its layer stay as they are.
_ATTENTION: tuple[_Heading, ...] = (
    (
        re.compile(r"(?:.*\.)?(?:self_attn|attn\.attention)\."),
        _PROJECTIONS,
        frozenset(("o_proj.bias", "out_proj.bias", *_BUFFERS)),
    ),
    (
        re.compile(r"(?:.*\.)?layer\.\d+\.attention\."),
        _SELF,
        frozenset(("output.dense.bias", *(f"output.LayerNorm.{end}" for end in _NORM))),
    ),
    (re.compile(r"(?:.*\.)?h\.\d+\.attn\."), _CONV1D, frozenset(("c_proj.bias", *_BUFFERS))),
    (
        re.compile(r"(?:.*\.)?layers\.\d+\.attention\."),
        _NEOX,
        frozenset(("dense.bias", *_BUFFERS)),
    ),
)
_COMPLETE = ({"query", "key", "out"}, {"in turn", "out"}, {"last", "first"}, {"mixed", "out"})
_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech")
"""Parts of multimodal models, whose heads are not those of the text config."""

_MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("", "gate_up_proj", "down_proj"),
    ("", "intermediate.dense", "output.dense"),
    ("", "c_fc", "c_proj"),
    ("", "dense_h_to_4h", "dense_4h_to_h"),
)
"""The linear layers of an MLP: the gate, where there is one, into the units, and out of them."""


def find_groups(source: ModelSource, heads: Heads | None) -> list[Group]:
    """Find the attention heads and MLP units of a model that can be permuted.

    Args:
        source: the model, of which only names and shapes are read.
        heads: the attention heads by its config; None leaves heads as they are.

    Returns:
        The groups: of a layer, its heads and its MLP units, and those of each expert.
    """
    names = tuple(source.names())

    groups = [] if heads is None else list(_attention_groups(names, heads, source.shape))
    return [*groups, *_mlp_groups(names, source.shape)]


def _attention_groups(
    names: Iterable[str], heads: Heads, shape: Callable[[str], Shape]
) -> Iterator[Group]:
    layers: dict[tuple[str, int], list[str]] = {}
    for name in names:
        for number, (heading, _, _) in enumerate(_ATTENTION):
            found = heading.match(name)
            if found is not None and not _OTHER_TOWERS.search(name):
                layers.setdefault((found.group(), number), []).append(name)
    for (begin, number), inside in layers.items():
        _, roles, untouched = _ATTENTION[number]
        ends = {name: name[len(begin) :] for name in inside}
        if any(end not in roles and end not in untouched for end in ends.values()):
            continue
        due = {name: roles[end] for name, end in ends.items() if end in roles}
        if heads.queries < 2 or not any(each <= set(due.values()) for each in _COMPLETE):
            continue
        parts = {name: _part(role, heads, shape(name)) for name, role in due.items()}
        if None not in parts.values():
            kept = tuple((name, part) for name, part in parts.items() if part and part.sections)
            yield Group(begin, heads, kept)


def _part(role: str, heads: Heads, shape: Shape) -> Part | None:
    """How a tensor of a role is permuted; None if its shape is not that of the role."""
    query: Section = ("query", heads.size)
    key: Section = ("key", heads.size)
    last = len(shape) - 1
    alike = heads.queries == heads.keys
    choices: dict[str, list[Part]] = {
        "query": [Part(0, (query,))],
        "key": [Part(0, (key,))],
        "in turn": [Part(0, (query, key, key))],
        "out": [Part(1, (query,))],
        "query norm": [Part(0, (query,)), Part(0, (("query", 1),))],
        "key norm": [Part(0, (key,)), Part(0, (("key", 1),))],
        "one each": [Part(0, (("query", 1),))],
        "last": [Part(last, (query, query, query))] if alike else [],
        "first": [Part(0, (query,))] if alike else [],
        "mixed": [Part(0, (("query", 3 * heads.size),))] if alike else [],
    }
    if role.endswith("norm") and shape == (heads.size,):
        return Part(0, ())  # one for all heads
    counts = {"query": heads.queries, "key": heads.keys}
    for part in choices[role]:
        length = sum(counts[kind] * block for kind, block in part.sections)
        if part.axis < len(shape) and shape[part.axis] == length:
            return part
    return None


def _mlp_groups(names: Iterable[str], shape: Callable[[str], Shape]) -> Iterator[Group]:
    present = frozenset(names)
    rooms: dict[str, list[str]] = {}
    for name in present:
        for place, char in enumerate(name):
            if char == ".":
                rooms.setdefault(name[: place + 1], []).append(name)
    for gate, into, out in _MLPS:
        for name in names:
            begin = name.removesuffix(f"{into}.weight")
            if (
                begin == name
                or begin[-1:] not in (".", "")
                or f"{begin}{out}.weight" not in present
            ):
                continue
            if _is_closed(begin, (gate, into, out), rooms):
                group = _mlp_group(begin, (gate, into, out), present, shape)
                if group is not None:
                    yield group


def _is_closed(begin: str, layers: tuple[str, str, str], rooms: Mapping[str, list[str]]) -> bool:
    """Whether an MLP has its linear layers, a norm behind them, and nothing else."""
    into = layers[1]
    nested = "." in into
    if not nested and re.search(r"(?<!experts)\.\d+\.$", begin):
        return False  # a whole layer, which has more than an MLP
    spaces = {f"{begin}{each.split('.')[0]}." for each in layers if each} if nested else {begin}
    known = {f"{begin}{each}.{kind}" for each in layers if each for kind in ("weight", "bias")}
    known |= {f"{begin}output.LayerNorm.{end}" for end in _NORM} if nested else set()
    return all(name in known for space in spaces for name in rooms.get(space, ()))


def _mlp_group(
    begin: str,
    layers: tuple[str, str, str],
    present: frozenset[str],
    shape: Callable[[str], Shape],
) -> Group | None:
    gate, into, out = layers
    rows, columns = shape(f"{begin}{into}.weight"), shape(f"{begin}{out}.weight")
    if len(rows) != 2 or len(columns) != 2:
        return None
    turned = False  # GPT-2 stores weights as (inputs, outputs)
    if into == "c_fc":
        bias = shape(f"{begin}c_fc.bias") if f"{begin}c_fc.bias" in present else ()
        if bias not in (rows[:1], rows[1:]) or rows[0] == rows[1]:
            return None
        turned = bias == rows[1:]
    units = columns[0] if turned else columns[1]
    sections: tuple[Section, ...] = (("unit", 1),) * (2 if into == "gate_up_proj" else 1)
    if rows[int(turned)] != units * len(sections) or units < 2:
        return None
    parts = [(f"{begin}{out}.weight", Part(0 if turned else 1, sections[:1]))]
    for layer in filter(None, (gate, into)):
        for kind, axis in (("weight", int(turned)), ("bias", 0)):
            name = f"{begin}{layer}.{kind}"
            if name in present:
                if shape(name)[axis] != units * len(sections):
                    return None
                parts.append((name, Part(axis, sections)))
    return Group(begin, units, tuple(parts))
