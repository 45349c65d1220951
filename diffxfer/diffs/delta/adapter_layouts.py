"""Which tensor an adapter's factors change, and how that tensor is laid out.

The factors do not say whether a layer stores its weight as (out, in) or as (in, out). The shape of
the weight says it, unless it is square.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.adapters.adapter import Factors

OUT_IN, IN_OUT = "out, in", "in, out"

_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria_text", "aria"})
"""Model types that store fused experts as (experts, in, out), as transformers marks them."""
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Model types with layers of transformers' class Conv1D, which stores (in, out)."""
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def is_fused(factors: Factors, shape: tuple[int, ...]) -> bool:
    """Whether factors change the fused experts of a layer.

    Args:
        factors: the factors.
        shape: the shape of the weight.
    """
    assert factors.a is not None
    return len(shape) == 3 and len(factors.a.shape) == 2


def layouts(factors: Factors, shape: tuple[int, ...]) -> list[str]:
    """The layouts in which factors make a tensor of a shape; none if they do not fit it.

    Args:
        factors: the factors.
        shape: the shape of the weight.
    """
    a, b = factors.a, factors.b
    assert a is not None
    assert b is not None
    if factors.of_embedding:
        return [IN_OUT] if shape == (a.shape[1], b.shape[0]) else []
    if is_fused(factors, shape):
        even = shape[0] > 0 and a.shape[0] % shape[0] == 0
        pairs = {OUT_IN: (b.shape[0], a.shape[1]), IN_OUT: (a.shape[1], b.shape[0])}
        return [name for name, pair in pairs.items() if even and shape[1:] == pair]
    found = [OUT_IN] if shape == (b.shape[0], *a.shape[1:]) else []
    if len(shape) == 2 and shape == (a.shape[1], b.shape[0]):
        found.append(IN_OUT)
    return found


def layout_of_square(
    module: str, config: Mapping[str, Any], *, fan_in_fan_out: bool, fused: bool
) -> str:
    """The layout of a square weight.

    Args:
        module: the name of the layer.
        config: base's config.
        fan_in_fan_out: what the adapter's config says. PEFT saves what the layer that it wrapped
            last was, so the model type is the better witness where it is known.
        fused: whether it is that of fused experts.
    """
    kinds = {part.get("model_type") for part in (config, *_parts(config))}
    if fused:
        return IN_OUT if kinds & _TRANSPOSED_EXPERTS else OUT_IN
    if kinds & _CONV1D:
        return IN_OUT if module.rpartition(".")[2] in _CONV1D_LAYERS else OUT_IN
    return IN_OUT if fan_in_fan_out else OUT_IN


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, dict)]


def fitting(
    factors: Factors, every: Sequence[Factors], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The parameters of a module that factors may change.

    Args:
        factors: some of the module's factors.
        every: all of them.
        shapes: the shapes of the parameters that the adapter's config names.

    Returns:
        Those whose shapes the factors fit; if there are several, those that are not the only ones
        that other factors fit.
    """
    fits = {id(each): [n for n, shape in shapes.items() if layouts(each, shape)] for each in every}
    own = fits[id(factors)]
    if len(own) < 2:
        return own
    taken = {
        names[0] for each in every if each is not factors and len(names := fits[id(each)]) == 1
    }
    return [name for name in own if name not in taken]
