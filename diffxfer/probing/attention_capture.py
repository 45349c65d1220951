"""The attention weights of a loaded model, layer by layer, while it runs."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.probing.forward_pass import Batch, run, without_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    Watcher = Callable[[int, "Attention"], None]

_LOOK = 16
"""Tokens of the row that shows where a model makes its attention weights."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a layer for a batch.

    Attributes:
        weights: shape `(rows, heads, queries, keys)`.
        mask: the mask that the layer was given, if one was found: shape
            `(rows or 1, heads or 1, queries, keys)`, True or a number for each key.
    """

    weights: torch.Tensor
    mask: torch.Tensor | None

    def of_rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of some rows in float64, and which keys each query may attend to.

        Args:
            rows: their places in the batch.

        Returns:
            Distributions of shape `(heads, queries of all rows, keys)`, and True where a key is
            allowed, of shape `(queries of all rows, keys)`.
        """
        from diffxfer.probing.forward_pass import exact

        weights = exact(self.weights[rows])
        # Some models have a sink outside the text, which takes a part of the attention.
        sums = weights.sum(-1, keepdim=True)
        shares = weights / sums.where(sums > 0, sums.new_ones(()))
        return shares.transpose(0, 1).flatten(1, 2), self._allowed(weights, rows).flatten(0, 1)

    def _allowed(self, weights: torch.Tensor, rows: slice) -> torch.Tensor:
        import torch

        used = (weights > 0).any(1)
        if self.mask is not None:
            mask = self.mask[rows if len(self.mask) > 1 else slice(None), 0].to(weights.device)
            if mask.is_floating_point():
                # A number that is added before the softmax; hardly finite where nothing passes.
                mask = mask > torch.finfo(mask.dtype).min / 2
            # A mask of another meaning, such as 0 and 1, contradicts the attention.
            if not bool((used & ~mask.bool()).any()):
                return mask.bool().expand_as(used)
        everything = torch.ones_like(used)
        return everything if bool(used.triu(1).any()) else everything.tril()


@dataclass(frozen=True, slots=True)
class _Place:
    """A module that returns attention weights, and their place in the tuple that it returns."""

    name: str
    module: torch.nn.Module
    index: int
    heads: int


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """Where a model makes its attention weights.

    Attributes:
        numbers: the number of each layer that has attention, as in the names of its tensors.
        heads: the number of heads of each.
    """

    model: PreTrainedModel
    places: tuple[_Place, ...]
    asked: bool
    numbers: tuple[int, ...]
    heads: tuple[int, ...]

    def watch(self, batch: Batch, layers: Sequence[int], tell: Watcher) -> None:
        """Run a batch, and tell the attention of some layers as soon as each is known.

        Args:
            batch: the rows.
            layers: places in `numbers`.
            tell: gets the place of a layer and its attention, in the order of the layers.
        """
        # Layers that share their weights, as ALBERT's, are calls of the same module.
        calls: dict[torch.nn.Module, list[tuple[int, bool]]] = {}
        for layer, place in enumerate(self.places):
            calls.setdefault(place.module, []).append((layer, layer in layers))
        with ExitStack() as stack:
            for module, made in calls.items():
                index = self.places[made[0][0]].index
                hook = _hook(index, made, tell)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            # Older models return the weights only when asked, and then hold those of all layers.
            run(self.model, batch, **({"output_attentions": True} if self.asked else {}))


def _hook(index: int, made: Sequence[tuple[int, bool]], tell: Watcher) -> Any:
    """Tell the wanted ones of the calls that a module gets during one batch."""
    calls = iter(made)

    def read(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer, wanted = next(calls)
        if wanted:
            weights = output[index]
            tell(layer, Attention(weights, _mask_in([*args, *kwargs.values()], weights)))

    return read


def _mask_in(given: Sequence[Any], weights: torch.Tensor) -> torch.Tensor | None:
    """The argument with a value for each query and key."""
    import torch

    rows, heads, queries, keys = weights.shape
    for value in given:
        if (
            isinstance(value, torch.Tensor)
            and value.ndim == 4
            and value.shape[-2:] == (queries, keys)
            and value.shape[0] in (1, rows)
            and value.shape[1] in (1, heads)
        ):
            return value
    return None


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute attention in the way that keeps its weights; put it back at the end.

    Args:
        model: a loaded model.
    """
    before = [(config, config._attn_implementation) for config in _configs(model.config)]
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        # The whole before its parts, because a config passes the value on to its parts.
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for part in config.sub_configs:
        if (found := getattr(config, part, None)) is not None:
            yield from _configs(found)


def find_attention(model: PreTrainedModel, row: Sequence[int]) -> AttentionLayers | str:
    """Find where a model makes its attention weights; within `eager_attention`.

    Args:
        model: a loaded model.
        row: token ids, of which the first few go through the model.

    Returns:
        The layers, or why there are none.
    """
    backbone = without_head(model)
    batch = Batch((0,), (tuple(row[:_LOOK]),))
    seen, outputs = _returned(backbone, batch, output_attentions=True)
    weights = [found for found in getattr(outputs, "attentions", None) or () if found is not None]
    if not weights:
        return "has no attention weights"
    length = len(batch.rows[0])
    if any(found.ndim != 4 or found.shape[-2:] != (length, length) for found in weights):
        return "has attention weights of another form than one for each pair of tokens"
    places = []
    for found in weights:
        # The innermost module comes first, and is the one that is given the mask.
        place = next(((key, i) for key, i, value in seen if value is found), None)
        if place is None:
            return "does not show which of its modules make the attention weights"
        (name, module), index = place
        places.append(_Place(name, module, index, int(found.shape[1])))
    del seen, outputs, weights
    seen, _ = _returned(backbone, batch)
    unasked = {(name, index) for (name, _), index, _ in seen}
    asked = any((place.name, place.index) not in unasked for place in places)
    numbers = _numbers([place.name for place in places])
    heads = tuple(place.heads for place in places)
    return AttentionLayers(backbone, tuple(places), asked, numbers, heads)


_Seen = list[tuple[tuple[str, Any], int, Any]]


def _returned(model: PreTrainedModel, batch: Batch, **options: bool) -> tuple[_Seen, Any]:
    """What the modules returned in tuples that may be attention weights, in the order of ending."""
    import torch

    seen: _Seen = []

    def note(key: tuple[str, Any]) -> Any:
        def read(_module: Any, _args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                seen.extend(
                    (key, index, value)
                    for index, value in enumerate(output)
                    if isinstance(value, torch.Tensor) and value.ndim == 4
                )

        return read

    with ExitStack() as stack:
        for key in model.named_modules():
            stack.callback(key[1].register_forward_hook(note(key)).remove)
        outputs = run(model, batch, **options)
    return seen, outputs


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    """The layers' numbers from the names of their modules, if they tell them apart."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    if len(set(numbers)) == len(names):
        return tuple(numbers)
    return tuple(range(len(names)))
