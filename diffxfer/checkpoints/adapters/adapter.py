"""The tensors of a LoRA adapter, grouped by the module that they change."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterConfig,
    merge_remedy,
    read_adapter_config,
)
from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.reader import read_shard
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.location import Place
    from diffxfer.checkpoints.stored import ShardFile, TensorSpec

_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_OTHER_TUNERS = re.compile(r"\.(?:lora|ia3|hada|lokr|oft|boft|vera|randlora|adalora)_")
_NESTED = ".base_layer"
_ORIGINAL = ".original_module."
_WRAPPED_ROWS = ".token_adapter."


@dataclass(slots=True)
class Factors:
    """The factors of one module, or of one parameter of a module with several.

    Attributes:
        module: the module's name in the model.
        a: ``lora_A``, or ``lora_embedding_A``.
        b: ``lora_B``, or ``lora_embedding_B``.
        bias: the bias of ``lora_B``.
        magnitude: DoRA's vector of magnitudes.
        of_embedding: whether they are an embedding's.
    """

    module: str
    a: TensorSpec | None = None
    b: TensorSpec | None = None
    bias: TensorSpec | None = None
    magnitude: TensorSpec | None = None
    of_embedding: bool = False


@dataclass(slots=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        place: its folder, or its repository on the Hub.
        config: its config.
        shard: its file.
        tensors: every tensor in it.
        factors: its factors by module; several parameters of one module come from the outermost
            wrapper to the innermost.
        rows: trained rows of tokens by module.
        whole: tensors that it stores whole, by their name in the model.
        copies: embeddings of base that it stores beside their factors, by name in the model.
    """

    place: Place
    config: AdapterConfig
    shard: ShardFile
    tensors: Mapping[str, TensorSpec]
    factors: dict[str, list[Factors]] = field(default_factory=dict)
    rows: dict[str, TensorSpec] = field(default_factory=dict)
    whole: dict[str, TensorSpec] = field(default_factory=dict)
    copies: dict[str, TensorSpec] = field(default_factory=dict)


def read_adapter(place: Place) -> Adapter:
    """Read the config and the header of a LoRA adapter.

    Args:
        place: the adapter.

    Returns:
        Its tensors, grouped and checked as far as they can be without base.

    Raises:
        CheckpointError: if it cannot be read, or a factor is missing, empty or of another dtype.
    """
    config = read_adapter_config(place)
    specs = _read_header(place)
    adapter = Adapter(place, config, next(iter(specs.values())).shard, specs)
    nested: dict[str, dict[int, Factors]] = {}
    for name, spec in specs.items():
        if spec.dtype not in FLOATS:
            raise odd(place, name, f"is {spec.dtype}, expected floats")
        if 0 in spec.shape:
            raise _empty(place, spec)
        _sort(adapter, nested, _clean(name), name, spec)
    for module, by_depth in nested.items():
        adapter.factors[module] = [by_depth[depth] for depth in sorted(by_depth)]
    for found in adapter.factors.values():
        for factors in found:
            _check(adapter, factors)
    _check_config(adapter)
    _separate_copies(adapter)
    return adapter


def _read_header(place: Place) -> Mapping[str, TensorSpec]:
    if place.files is not None:
        from diffxfer.checkpoints.hub.download import download

        file = place.files[ADAPTER_WEIGHTS]
        if not file.here:
            download([file])
    specs = read_shard(place.folder / ADAPTER_WEIGHTS)
    if not specs:
        raise CheckpointError(place.label, f"{ADAPTER_WEIGHTS} has no tensors", "save it again")
    return specs


def _clean(name: str) -> str:
    """A tensor's name in the model, without PEFT's prefix and training's wrappers."""
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(kept).removeprefix(_PREFIX)


def odd(place: Place, name: str, problem: str) -> CheckpointError:
    """The error for a tensor that does not fit the rest of its adapter.

    Args:
        place: the adapter.
        name: the tensor.
        problem: what is wrong with it.
    """
    where = f"{place.label}/{ADAPTER_WEIGHTS}"
    return CheckpointError(where, f"{short(name)} {problem}", "save the adapter again")


def _sort(
    adapter: Adapter,
    nested: dict[str, dict[int, Factors]],
    name: str,
    stored: str,
    spec: TensorSpec,
) -> None:
    """Put one tensor where it belongs."""
    place = adapter.place
    tokens = _TOKENS.fullmatch(name)
    if tokens:
        adapter.rows[tokens["module"].replace(_NESTED, "")] = spec
        return
    found = _FACTOR.fullmatch(name)
    if found is None:
        if _OTHER_TUNERS.search(name):
            raise CheckpointError(
                place.label, f"has {short(stored)}, which is no tensor of LoRA", merge_remedy(place)
            )
        if _ORIGINAL in name:  # a copy of base's, beside the trained one
            return
        inner = name.replace(_NESTED, "").replace(".modules_to_save.default", "")
        inner = inner.replace(_WRAPPED_ROWS, ".")
        adapter.whole[inner.replace(".modules_to_save", "")] = spec
        return
    module = found["module"].replace(_NESTED, "")
    depth = found["module"].count(_NESTED)
    factors = nested.setdefault(module, {}).setdefault(depth, Factors(module))
    kind = found["kind"].removeprefix("lora_")
    slot = {"A": "a", "B": "b", "embedding_A": "a", "embedding_B": "b"}.get(kind, "magnitude")
    if found["leaf"] == "bias":
        slot = "bias" if slot == "b" else "?"
    if slot == "?" or getattr(factors, slot) is not None:
        raise odd(place, stored, "is not expected there, or is there twice")
    setattr(factors, slot, spec)
    factors.of_embedding |= kind.startswith("embedding")


def _check(adapter: Adapter, factors: Factors) -> None:
    """Refuse factors that are incomplete, or do not fit each other."""
    a, b = factors.a, factors.b
    for missing, other in (("A", b), ("B", a)):
        if other is not None and None in (a, b):
            raise odd(adapter.place, other.name, f"has no lora_{missing} beside it")
    if a is None or b is None:
        raise odd(adapter.place, factors.module, "has a magnitude without factors")
    for spec in (a, b):
        if len(spec.shape) < 2:
            raise _empty(adapter.place, spec)
    if a.shape[0] != b.shape[1]:
        problem = f"has the shape {b.shape}, expected (out, {a.shape[0]}) beside {a.shape}"
        raise odd(adapter.place, b.name, problem)
    if adapter.config.dora != (factors.magnitude is not None):
        has = "has no lora_magnitude_vector" if adapter.config.dora else "has a magnitude"
        problem = f"{has} beside it, and {ADAPTER_CONFIG} says use_dora: {adapter.config.dora}"
        raise odd(adapter.place, a.name, problem.replace("True", "true").replace("False", "false"))


def _check_config(adapter: Adapter) -> None:
    """Refuse an adapter without any of the tensors that its config names."""
    for key, stated, found in (
        ("modules_to_save", adapter.config.modules_to_save, adapter.whole),
        ("trainable_token_indices", adapter.config.token_indices, adapter.rows),
    ):
        if stated and not found:
            where = f"{adapter.place.label}/{ADAPTER_WEIGHTS}"
            problem = f"has no tensor of {key}, which {ADAPTER_CONFIG} names"
            raise CheckpointError(where, problem, "save the adapter again")


def _empty(place: Place, spec: TensorSpec) -> CheckpointError:
    return CheckpointError(
        f"{place.label}/{ADAPTER_WEIGHTS}",
        f"{short(spec.name)} has the shape {spec.shape}, which is no whole tensor",
        "gather the parts of DeepSpeed ZeRO-3 or FSDP before you save the adapter",
    )


def _separate_copies(adapter: Adapter) -> None:
    """Tell copies of base's embeddings, which PEFT saves beside factors, from trained tensors."""
    for module in (*adapter.factors, *adapter.rows):
        name = f"{module}.weight"
        if name in adapter.whole:
            adapter.copies[name] = adapter.whole.pop(name)
