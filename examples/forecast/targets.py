"""The targets of a family: really trained further, and made by arithmetic as controls."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch

State = dict[str, torch.Tensor]

# Steps, share of the family's rate, and what is read: docstrings of other packages, or their code.
TRAINED: Mapping[str, tuple[int, float, str]] = {
    "short": (60, 0.25, "docs"),
    "medium": (150, 0.5, "docs"),
    "long": (300, 1.0, "docs"),
    "code": (200, 1.0, "code"),
}
LINES: Mapping[str, tuple[str, float]] = {
    "line 0.5": ("long", 0.5),
    "line 2.0": ("medium", 2.0),
}
NOISES: Mapping[str, float] = {"noise 0.2": 0.2, "noise 0.4": 0.4}
UNRELATED = "unrelated"
ON_FIRST = (*TRAINED, "line 2.0", "noise 0.4", "permuted", UNRELATED)
ON_SECOND = ("medium", "long", "line 0.5", "noise 0.2", "permuted layer")
"""The targets on which the first fine-tune of a family is graded, and the second."""


def moved(start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], k: float) -> State:
    """Return start + k · (end − start)."""
    return {
        name: start[name] + k * (end[name] - start[name])
        if start[name].is_floating_point()
        else start[name]
        for name in start
    }


def noisy(state: Mapping[str, torch.Tensor], share: float) -> State:
    """Return the state with normal noise on its matrices, `share` of each one's spread."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: each + share * each.std() * torch.randn(each.shape, generator=draw)
        if each.ndim >= 2
        else each.clone()
        for name, each in state.items()
    }


def permuted(model: Any, layers: int | None = None) -> Any:
    """Return a copy that computes the same function, with its heads and MLP units in another order.

    Args:
        model: a Llama, Qwen2, GPT-2 or GPT-NeoX.
        layers: how many layers to permute, from the first one on; all by default.
    """
    copy, config = deepcopy(model), model.config
    draw = torch.Generator().manual_seed(7)
    kind = config.model_type
    blocks = {"gpt2": "h"}.get(kind, "layers")
    heads, width = config.num_attention_heads, config.hidden_size
    order: Callable[[int], torch.Tensor] = lambda n: torch.randperm(n, generator=draw)  # noqa: E731
    with torch.no_grad():
        for block in list(getattr(copy.base_model, blocks))[:layers]:
            if kind == "gpt2":
                _permute_gpt2(block, order, heads, width)
            elif kind == "gpt_neox":
                _permute_neox(block, order, heads, width)
            else:
                _permute_llama(block, order, heads, width)
    return copy


def _of_heads(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Return the places of the units of heads in a new order, each head of `size` units."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _take(layer: Any, places: torch.Tensor, dim: int) -> None:
    """Reorder a layer's weight along `dim`; its bias follows where `dim` is the output's."""
    layer.weight.copy_(layer.weight.index_select(dim, places))
    is_output = dim == (1 if type(layer).__name__ == "Conv1D" else 0)
    if is_output and layer.bias is not None:
        layer.bias.copy_(layer.bias[places])


def _permute_llama(block: Any, order: Any, heads: int, width: int) -> None:
    attention, mlp = block.self_attn, block.mlp
    places = _of_heads(order(heads), width // heads)
    for each in (attention.q_proj, attention.k_proj, attention.v_proj):
        _take(each, places, 0)
    _take(attention.o_proj, places, 1)
    units = order(mlp.down_proj.weight.shape[1])
    for each in (mlp.gate_proj, mlp.up_proj):
        _take(each, units, 0)
    _take(mlp.down_proj, units, 1)


def _permute_gpt2(block: Any, order: Any, heads: int, width: int) -> None:
    places = _of_heads(order(heads), width // heads)
    _take(block.attn.c_attn, torch.cat([places + part * width for part in range(3)]), 1)
    _take(block.attn.c_proj, places, 0)
    units = order(block.mlp.c_fc.weight.shape[1])
    _take(block.mlp.c_fc, units, 1)
    _take(block.mlp.c_proj, units, 0)


def _permute_neox(block: Any, order: Any, heads: int, width: int) -> None:
    shuffled, size = order(heads), width // heads
    # Each head's query, key and value lie next to each other.
    _take(block.attention.query_key_value, _of_heads(shuffled, 3 * size), 0)
    _take(block.attention.dense, _of_heads(shuffled, size), 1)
    units = order(block.mlp.dense_h_to_4h.weight.shape[0])
    _take(block.mlp.dense_h_to_4h, units, 0)
    _take(block.mlp.dense_4h_to_h, units, 1)
