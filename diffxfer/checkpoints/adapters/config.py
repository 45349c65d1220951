"""The config of a LoRA adapter, ``adapter_config.json``, and the adapters that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.patterns import Patterns
from diffxfer.checkpoints.companions import companion_path, read_object
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.location import Place

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_TOKENS = "trainable_token_indices"

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change base's own weights, so that Δ is not the product of the factors."""
_VARIANTS = {
    "layer_replication": "repeats layers (layer_replication), so it is another architecture",
    "alora_invocation_tokens": "is an activated LoRA (aLoRA): its Δ depends on the input",
    "use_qalora": "is a QALoRA, whose Δ is not the product of its factors",
    "use_bdlora": "is a BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "is an Arrow router over several adapters: its Δ depends on the input",
    "velora_config": "is a VeLoRA, which is not supported",
    "kasa_config": "is a KaSA, whose Δ is not the product of its factors",
    "monteclora_config": "is a MonteCLoRA, whose Δ is random",
    "megatron_config": "is split for Megatron, which is not supported",
}
"""Options of variants whose Δ is another one, by key of the config."""
_NEVER_MERGED = frozenset(
    (
        *("layer_replication", "alora_invocation_tokens", "use_qalora", "arrow_config"),
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
        *("CARTRIDGE", "ADAPTION_PROMPT", "XLORA", "POLY"),
    )
)
"""Variants and types that `merge_and_unload` refuses, or makes another architecture of."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What decides Δ in a LoRA adapter's config.

    Attributes:
        base: the model that it was trained on, as the config names it; empty if it does not.
        rank: the rank of modules that no pattern matches.
        alpha: their alpha.
        ranks: ranks by pattern of module names.
        alphas: alphas by pattern of module names.
        rank_stabilized: whether the scaling is alpha / √rank instead of alpha / rank.
        fan_in_fan_out: whether layers store their weight as (in, out).
        dora: whether every module has a vector of magnitudes.
        modules_to_save: the names of modules that are stored whole.
        ties: whether a head that base ties is trained with its embedding.
        parameters: the names of parameters that are adapted directly, such as fused experts.
        token_indices: the ids of trained rows by module name; the key is empty for the embedding.
    """

    base: str
    rank: int
    alpha: float
    ranks: Patterns[int]
    alphas: Patterns[float]
    rank_stabilized: bool
    fan_in_fan_out: bool
    dora: bool
    modules_to_save: tuple[str, ...]
    ties: bool
    parameters: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]

    def saves(self, module: str) -> bool:
        """Whether a module is one of `modules_to_save`.

        Args:
            module: its name in the model.
        """
        return any(module == key or module.endswith(f".{key}") for key in self.modules_to_save)

    def rank_of(self, module: str) -> int:
        """The rank of a module.

        Args:
            module: its name in the model.
        """
        return self.ranks.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The scaling of a module's Δ.

        Args:
            module: its name in the model.
        """
        alpha = self.alphas.get(module, self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def is_adapter(place: Place) -> bool:
    """Whether a checkpoint is a PEFT adapter: it has one, and no weights of a whole model.

    Args:
        place: the checkpoint.
    """
    found = any(place.has(name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return found and place.shard_names is None


def read_adapter_config(place: Place) -> AdapterConfig:
    """Read the config of a LoRA adapter.

    Args:
        place: the adapter.

    Raises:
        CheckpointError: if it is no LoRA adapter, or a variant that cannot be read; the message
            names the remedy.
        CompanionError: if the config is missing or malformed.
    """
    path = companion_path(place.folder, ADAPTER_CONFIG)
    if path is None:
        raise CheckpointError(
            place.label, f"has {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}", "download it again"
        )
    raw = read_object(path)
    _refuse_others(place, raw)
    try:
        return _parse(raw)
    except (TypeError, ValueError) as exc:
        raise CheckpointError(path, f"is no LoRA config: {exc}", "save the adapter again") from exc


def _refuse_others(place: Place, raw: Mapping[str, Any]) -> None:
    kind = str(raw.get("peft_type"))
    if kind != "LORA":
        problem = f"is a PEFT adapter of type {kind[:40]}, and only LORA can be read"
        raise CheckpointError(place.label, problem, _remedy(place, kind))
    for key, problem in _VARIANTS.items():
        if raw.get(key):
            raise CheckpointError(place.label, problem, _remedy(place, key))
    start = str(raw.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        problem = f"was initialised with {start}, which changed base's weights too"
        raise CheckpointError(place.label, problem, merge_remedy(place))
    if not place.has(ADAPTER_WEIGHTS):
        if place.has(_PICKLED):
            problem = f"has pickled weights only ({_PICKLED}): loading a pickle runs code"
            remedy = f"if you trust it, {merge_remedy(place)}"
            raise CheckpointError(place.label, problem, remedy)
        raise CheckpointError(place.label, f"has no {ADAPTER_WEIGHTS}", "download it again")


def merge_remedy(place: Place) -> str:
    """How to merge an adapter with PEFT, for messages.

    Args:
        place: the adapter.
    """
    named = repr(place.label)
    file = next(iter(place.files.values()), None) if place.files is not None else None
    if file is not None:
        named = f"{file.repo!r}, revision={file.commit!r}"
    return (
        "merge it with PEFT, and give the result: AutoPeftModelForCausalLM"
        f".from_pretrained({named}).merge_and_unload().save_pretrained('merged')"
    )


def _remedy(place: Place, kind: str) -> str:
    if kind in _NEVER_MERGED:
        return "it has no difference of weights to its base: train a plain LoRA instead"
    return merge_remedy(place)


def _parse(raw: Mapping[str, Any]) -> AdapterConfig:
    tokens = raw.get(_TOKENS) or {}
    if isinstance(tokens, list):
        tokens = {"": tokens}
    if not isinstance(tokens, dict):
        raise TypeError(f"{_TOKENS} is {_said(tokens)}, expected a list or an object")
    return AdapterConfig(
        base=_text(raw.get("base_model_name_or_path") or "", "base_model_name_or_path"),
        rank=_positive(raw.get("r"), "r"),
        alpha=_number(raw.get("lora_alpha"), "lora_alpha"),
        ranks=Patterns({k: _positive(v, "rank_pattern") for k, v in _items(raw, "rank_pattern")}),
        alphas=Patterns({k: _number(v, "alpha_pattern") for k, v in _items(raw, "alpha_pattern")}),
        rank_stabilized=_flag(raw, "use_rslora"),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out"),
        dora=_flag(raw, "use_dora"),
        modules_to_save=_texts(raw, "modules_to_save"),
        ties=_flag(raw, "ensure_weight_tying"),
        parameters=_texts(raw, "target_parameters"),
        token_indices={
            key: tuple(map(_index, _listed(ids, _TOKENS))) for key, ids in tokens.items()
        },
    )


def _items(raw: Mapping[str, Any], key: str) -> Sequence[tuple[str, Any]]:
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise TypeError(f"{key} is {_said(found)}, expected an object")
    return [*found.items()]


def _listed(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{key} is {_said(value)}, expected a list")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key} is or has {_said(value)}, expected a string")
    return value


def _texts(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_text(each, key) for each in _listed(raw.get(key) or [], key))


def _said(value: Any) -> str:
    """A value as JSON writes it, short."""
    return json.dumps(value)[:40]


def _positive(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {_said(value)}, expected a positive integer")
    return value


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a token id is {_said(value)}, expected an integer from 0")
    return value


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{key} is {_said(value)}, expected true or false")
    return bool(value)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {_said(value)}, expected a number")
    return float(value)
