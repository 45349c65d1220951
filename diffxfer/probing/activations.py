"""How much the target's layers change what base's layers compute.

A linear layer of base maps its input x to Bx; the target's layer of the same name would map it to
Tx. The ratio ‖(T − B)x‖ / ‖Bx‖, with x as base itself computes it on some text, says how far the
two models compute different things, whatever the size of the diff vector. Of the numbers measured
in ``examples/forecast/`` it ranked grafts best by the share of direct fine-tuning's gain that they
recovered. Embeddings, norms, biases and output heads do not count: with the head or the biases it
ranked no better there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.inspection.places import places
from diffxfer.errors import DataError, EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

ROW_TOKENS = 128
"""Tokens in a row of text: few enough for every model's context."""


@dataclass(frozen=True, slots=True)
class LayerRatio:
    """What one linear layer of the target changes.

    Attributes:
        name: the layer's name in the model without its head.
        layer: the number of the layer it belongs to, −1 outside any.
        kind: the kind of its module, such as ``"q"`` or ``"down"``.
        ratio: ‖(T − B)x‖ / ‖Bx‖ over all tokens; infinite if only Bx is 0.
    """

    name: str
    layer: int
    kind: str
    ratio: float


@dataclass(frozen=True, slots=True)
class ActivationRatio:
    """What the linear layers of the target change, on average.

    Attributes:
        mean: the mean of the layers' ratios.
        layers: each linear layer, in the order of the model.
        tokens: how many tokens base read.
        covered: the share of the weights that these layers hold, among all weights of base that
            have two dimensions or more and are no embedding; fused experts are not measured.
        left_out: linear layers that the target lacks, or that base did not use for this text.
    """

    mean: float
    layers: tuple[LayerRatio, ...]
    tokens: int
    covered: float
    left_out: tuple[str, ...] = ()

    def by_layer(self) -> dict[int, float]:
        """The mean ratio of each numbered layer."""
        return _means((each.layer, each.ratio) for each in self.layers)

    def by_kind(self) -> dict[str, float]:
        """The mean ratio of each kind of module."""
        return _means((each.kind, each.ratio) for each in self.layers)

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data; a ratio that is not finite is None."""
        return {
            "mean": _finite(self.mean),
            "by_layer": [[layer, _finite(mean)] for layer, mean in self.by_layer().items()],
            "by_kind": {kind: _finite(mean) for kind, mean in self.by_kind().items()},
            "layers": [
                {"name": e.name, "layer": e.layer, "kind": e.kind, "ratio": _finite(e.ratio)}
                for e in self.layers
            ],
            "tokens": self.tokens,
            "covered": self.covered,
            "left_out": list(self.left_out),
        }


def activation_ratio(
    base_model: Any, target_model: Any, token_rows: Iterable[Sequence[int]]
) -> ActivationRatio:
    """Measure how much the target's linear layers change what base's compute.

    Base reads each row alone, so that no padding counts. Layers are compared on base's inputs; the
    target itself is never run. Products are computed in float32 and summed in float64, one layer
    at a time: beyond the two models it takes the memory of three float32 copies of a layer.

    Args:
        base_model: a transformers model.
        target_model: another one with layers of the same names and shapes.
        token_rows: token ids for base; `text_rows` makes some of a text.

    Returns:
        The mean over the linear layers, and each of them.

    Raises:
        DataError: if there is no token.
        EvaluationError: if the models have no linear layer in common, or one differs in shape.
    """
    base, target = _trunk(base_model), _trunk(target_model)
    rows = [list(map(int, row)) for row in token_rows if len(row)]
    if not rows:
        raise DataError("", "no token to measure activations on", "give some text")
    ratios, left_out = linear_ratios(base, target, rows)
    if not ratios:
        raise EvaluationError(
            "target",
            f"none of base's {len(left_out)} linear layers is in the target by name, or used",
            "compare models of the same architecture",
        )
    found = places(f"{name}.weight" for name in ratios)
    layers = tuple(
        LayerRatio(name, place.layer, place.kind, ratio)
        for (name, ratio), place in zip(ratios.items(), found.values(), strict=True)
    )
    return ActivationRatio(
        mean=math.fsum(ratios.values()) / len(ratios),
        layers=layers,
        tokens=sum(map(len, rows)),
        covered=_covered(base, ratios),
        left_out=tuple(left_out),
    )


def linear_ratios(
    base: torch.nn.Module,
    target: torch.nn.Module,
    rows: Iterable[Sequence[int]],
    *,
    biases: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """‖(T − B)x‖ / ‖Bx‖ of each linear layer that base uses, by name, and the names left out.

    Args:
        base: a module that takes ``input_ids``; it is run as it is, without dropout.
        target: a module with layers of the same names.
        rows: token ids.
        biases: whether a layer is its weight and its bias, or its weight alone.

    Raises:
        EvaluationError: if a layer differs in shape.
    """
    import torch

    theirs = dict(_linears(target))
    own = dict(_linears(base))
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in own if name in theirs}
    hooks = [
        own[name].register_forward_pre_hook(_summing(name, theirs[name], total, biases))
        for name, total in sums.items()
    ]
    training = base.training
    base.eval()
    try:
        with torch.inference_mode():
            for row in rows:
                base(**_inputs(base, row))
    finally:
        for hook in hooks:
            hook.remove()
        base.train(training)
    # Both sums are 0 where base did not use the layer for this text.
    ratios = {name: _root_ratio(*total.tolist()) for name, total in sums.items() if total.any()}
    return ratios, [name for name in own if name not in ratios]


def shipped_text() -> str:
    """The English text that is read where no data is given."""
    return Path(__file__).with_name("text.txt").read_text("utf-8")


def text_rows(
    tokenizer: Any, text: str | None = None, *, row_tokens: int = ROW_TOKENS
) -> list[list[int]]:
    """Cut a text into rows of tokens.

    Args:
        tokenizer: a transformers tokenizer, which adds its special tokens once, around the text.
        text: the text; the shipped one by default.
        row_tokens: how long a row may be.
    """
    text = shipped_text() if text is None else text
    # Else it warns that the text is too long for the model, before it is cut.
    ids = list(map(int, tokenizer(text, verbose=False)["input_ids"]))
    return [ids[start : start + row_tokens] for start in range(0, len(ids), row_tokens)]


def _trunk(model: Any) -> Any:
    """The model without its output head: what transformers calls the base model."""
    return getattr(model, "base_model", model)


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, each in module.named_modules():
        if isinstance(each, (torch.nn.Linear, Conv1D)):
            yield name, each


def _matrix(layer: Any) -> torch.Tensor:
    """The weight of a layer, shape `(out, in)`; Conv1D stores the transpose."""
    import torch

    weight: torch.Tensor = layer.weight.detach()
    return weight if isinstance(layer, torch.nn.Linear) else weight.T


def _summing(
    name: str, other: Any, total: torch.Tensor, biases: bool
) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    """A hook that adds ‖(T − B)x‖² and ‖Bx‖² of one call to `total`."""

    def add(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        ours, theirs = (_matrix(each).to(x.device).float() for each in (layer, other))
        if ours.shape != theirs.shape:
            raise EvaluationError(
                name,
                f"is {tuple(ours.shape)} in base and {tuple(theirs.shape)} in the target",
                "compare models of the same architecture",
            )
        changed, computed = x @ (theirs - ours).T, x @ ours.T
        if biases and layer.bias is not None:
            bias = layer.bias.detach().float()
            changed = changed + (other.bias.detach().to(x.device).float() - bias)
            computed = computed + bias
        for place, values in enumerate((changed, computed)):
            total[place] += values.double().square().sum().cpu()

    return add


def _inputs(model: Any, row: Sequence[int]) -> dict[str, torch.Tensor]:
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([list(row)], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _root_ratio(changed: float, computed: float) -> float:
    return math.sqrt(changed / computed) if computed else math.inf


def _covered(base: torch.nn.Module, measured: Mapping[str, float]) -> float:
    """The share of base's matrices, without embeddings, that are in `measured`."""
    import torch

    embeddings = {
        id(each.weight) for each in base.modules() if isinstance(each, torch.nn.Embedding)
    }
    sizes = {
        name: weight.numel()
        for name, weight in base.named_parameters()
        if weight.ndim >= 2 and id(weight) not in embeddings
    }
    return sum(sizes.get(f"{name}.weight", 0) for name in measured) / sum(sizes.values())


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    gathered: dict[Any, list[float]] = {}
    for key, value in pairs:
        gathered.setdefault(key, []).append(value)
    return {key: math.fsum(values) / len(values) for key, values in gathered.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
