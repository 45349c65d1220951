"""The same function in other coordinates: a model with its heads and MLP units permuted.

Two such models compute the same and yet differ in nearly every weight, so a straight path between
them shows how high a barrier is where coordinates do not match: a path is held against it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from diffxfer.checkpoints.text_config import config_parts
from diffxfer.models.source import ModelSource
from diffxfer.probing.permutable import Heads, find_groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from diffxfer.probing.permutable import Group, Part


class Permuted(NamedTuple):
    """A permuted model, if its architecture allows it.

    Attributes:
        source: the model, or None if nothing can be permuted.
        what: what was permuted, or why nothing was, in words.
    """

    source: ModelSource | None
    what: str


def permuted_source(source: ModelSource, seed: int = 0) -> Permuted:
    """Permute the attention heads and the MLP units of a model, so that it computes the same.

    Query heads stay with their key and value head. Tensors are recognised by their names, their
    shapes and the numbers of heads in the config; what is not recognised stays as it is.

    Args:
        source: the model. It stays open, and belongs to the caller.
        seed: of the permutations; each layer has its own.

    Returns:
        The permuted model, whose tensors are made when they are asked for.
    """
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    groups = find_groups(source, _heads(config))
    attention = sum(isinstance(group.axes, Heads) for group in groups)
    if not groups:
        what = "no attention heads or MLP units were recognised by the names and shapes of tensors"
        return Permuted(None, what)
    found = {
        f"the heads of {attention} layers": attention,
        f"the units of {len(groups) - attention} MLPs": len(groups) - attention,
    }
    what = " and ".join(text for text, count in found.items() if count)
    return Permuted(_PermutedSource(source, groups, seed), f"{what} were permuted")


def _heads(config: Mapping[str, object]) -> Heads | None:
    """The numbers of heads by the config; None if it does not say, or heads cannot be permuted."""
    known: dict[str, int] = {}
    for part in config_parts(config):
        known |= {key: value for key, value in part.items() if type(value) is int}
        # Layers that share keys and values would all need the same permutation; position biases
        # that follow the number of a head are no weights.
        if part.get("num_kv_shared_layers") or part.get("alibi"):
            return None
    queries = known.get("num_attention_heads", known.get("n_head", known.get("num_heads")))
    width = known.get("hidden_size", known.get("n_embd", known.get("d_model")))
    if not queries or not width:
        return None
    keys = known.get("num_key_value_heads", queries)
    size = known.get("head_dim", width // queries)
    return Heads(queries, keys, size) if keys and queries % keys == 0 else None


class _PermutedSource(ModelSource):
    """A model with permuted tensors."""

    def __init__(self, source: ModelSource, groups: list[Group], seed: int) -> None:
        self.label = f"{source.label} permuted"
        self.folder = source.folder
        self._source = source
        self._parts = {name: (group, part) for group in groups for name, part in group.parts}
        self._seed = seed

    def names(self) -> Iterator[str]:
        """The names of all tensors, in the order of the model."""
        return self._source.names()

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors names it."""
        return self._source.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._source.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A new tensor, with the numbers of the model in another order."""
        import torch

        tensor = self._source.tensor(name)
        if name not in self._parts:
            return tensor
        group, part = self._parts[name]
        order = torch.from_numpy(_order(group, part, self._seed))
        return tensor.index_select(part.axis, order)


def _order(group: Group, part: Part, seed: int) -> NDArray[np.int64]:
    """Where each place along the axis of a tensor comes from."""
    import numpy as np

    orders = _orders(group, seed)
    places, begin = [], 0
    for kind, block in part.sections:
        order = orders[kind]
        places.append((begin + order[:, None] * block + np.arange(block)).reshape(-1))
        begin += len(order) * block
    return np.concatenate(places)


def _orders(group: Group, seed: int) -> dict[str, NDArray[np.int64]]:
    """The permutation of each kind of head or unit of a group, drawn until it moves something."""
    import numpy as np

    generator = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(group.name.encode())])
    axes = group.axes
    while True:
        if isinstance(axes, Heads):
            keys = generator.permutation(axes.keys)
            share = axes.queries // axes.keys
            inside = [generator.permutation(share) for _ in range(axes.keys)]
            found = np.concatenate([key * share + inside[key] for key in keys])
            orders = {"query": found, "key": keys}
        else:
            found = generator.permutation(axes)
            orders = {"unit": found}
        if (found != np.arange(len(found))).any():
            return orders
