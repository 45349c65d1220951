"""The names that a model's tensors have once transformers has loaded it; PEFT uses these.

transformers renames the tensors of some checkpoints when it loads them, and stacks the experts of
a layer, which are stored one by one, into one parameter. Its own rules say how; they need the
model, which is built without memory for its weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.text_config import TEXT_CONFIGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor

_EXPERT = re.compile(r"\.experts\.\d+\.")
_MERGED = [("MergeModulelist", 0)]
_CONCATENATED = [*_MERGED, ("Concatenate", 1)]
_LEFT_OUT = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "auto_map",
    "quantization_config",
    "use_pretrained_backbone",
}
"""Keys of a config that name code or weights of others, or say how weights are packed."""
_NOT_UNDERSTOOD = (
    *(AttributeError, ImportError, IndexError, KeyError, OSError),
    *(RuntimeError, TypeError, ValueError, ZeroDivisionError),
)
LINEAR, EMBEDDING = "linear", "embedding"


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk that is a part of a stacked parameter.

    Attributes:
        name: its name on disk.
        expert: the expert.
        row: its first row in the expert's matrix.
        shape: its shape, ``(rows, columns)``.
    """

    name: str
    expert: int
    row: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stacked:
    """A parameter with all experts of a layer, which are stored one by one.

    Attributes:
        name: its name in the loaded model.
        shape: its shape, ``(experts, rows, columns)``.
        transposed: whether the matrix of an expert is stored as (in, out).
        pieces: the tensors on disk that it is made of.
    """

    name: str
    shape: tuple[int, int, int]
    transposed: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class LoadedNames:
    """The names of a model's tensors once transformers has loaded it.

    Attributes:
        names: the name of each tensor that is loaded as it is, by its name on disk.
        stacked: the stacked parameters, by their names.
        parameters: every parameter of the model, in the order of its modules.
        kinds: what each module with parameters is: `LINEAR`, `EMBEDDING`, or its class.
        shared: the parameters that are others too, as a tied head is.
        expert_leaves: the last parts of the names of experts' modules on disk.
    """

    names: Mapping[str, str]
    stacked: Mapping[str, Stacked]
    parameters: Sequence[str]
    kinds: Mapping[str, str]
    shared: frozenset[str]
    expert_leaves: set[str] = field(default_factory=set, init=False)
    _parents: dict[str, Stacked] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for stacked in self.stacked.values():
            self._parents.update((piece.name, stacked) for piece in stacked.pieces)
            self.expert_leaves.update(piece.name.split(".")[-2] for piece in stacked.pieces)

    def parent(self, name: str) -> Stacked | None:
        """The stacked parameter that a tensor on disk is a part of.

        Args:
            name: its name on disk.
        """
        return self._parents.get(name)

    @property
    def on_disk(self) -> dict[str, str]:
        """The name on disk of each tensor that is loaded as it is, by its name in the model."""
        return {loaded: name for name, loaded in self.names.items()}


def may_differ(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's names may change when transformers loads it.

    Args:
        checkpoint: an encoder-decoder or multimodal model, or one with experts; or any other.
    """
    config = checkpoint.config
    return (
        bool(config.get("is_encoder_decoder"))
        or any(isinstance(config.get(key), dict) for key in TEXT_CONFIGS)
        or any("block_sparse_moe" in n or _EXPERT.search(n) for n in checkpoint.tensors)
    )


def loaded_names(checkpoint: Checkpoint) -> LoadedNames | None:
    """Find the names of a model's tensors once transformers has loaded it.

    No weight is read, and no code of the checkpoint is run.

    Args:
        checkpoint: the model.

    Returns:
        The names; None if transformers does not know the model, or its tensors are not all
        accounted for.
    """
    model = _empty_model(checkpoint.config)
    if model is None:
        return None
    names, groups = _sort(model, checkpoint.tensors)
    state = model.state_dict()
    stacked = {}
    for name, by_pattern in groups.items():
        module = model.get_submodule(name.rpartition(".")[0])
        transposed = bool(getattr(module, "is_transposed", False))
        found = _stack(name, tuple(state[name].shape), by_pattern, checkpoint.tensors, transposed)
        if found is not None:
            stacked[name] = found
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return LoadedNames(names, stacked, parameters, _kinds(model), _shared(model))


def _empty_model(config: Mapping[str, Any]) -> Any:
    """The model of a config, without memory for its weights; None if transformers lacks it."""
    try:
        import torch
        import transformers
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    named, kind = config.get("architectures"), config.get("model_type")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    try:
        model_class = getattr(transformers, name, None)
        if not isinstance(model_class, type):
            return None
        if not issubclass(model_class, transformers.PreTrainedModel):
            return None
        made = CONFIG_MAPPING[kind].from_dict(_harmless(config))
        with torch.device("meta"):
            return model_class(made)
    except (StrictDataclassError, *_NOT_UNDERSTOOD):
        return None  # a config that this release of transformers does not understand


def _harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what makes transformers download something, or expect packed weights."""
    return {
        key: _harmless(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _LEFT_OUT
    }


def _sort(
    model: Any, tensors: Iterable[str]
) -> tuple[dict[str, str], dict[str, dict[int, tuple[Any, list[str]]]]]:
    """The tensors that are loaded as they are; and those that are converted, by their target.

    The latter are grouped by the pattern that they match, in the order of the patterns.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    groups: dict[str, dict[int, tuple[Any, list[str]]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        found, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if found not in state and name in state:
            found, pattern = rename_source_key(name, [], [], prefix, state)
        if found not in state:
            continue
        if pattern is None:
            names[name] = found
            continue
        rule = next(rule for rule in converters if pattern in rule.source_patterns)
        place = rule.source_patterns.index(pattern)
        groups.setdefault(found, {}).setdefault(place, (rule, []))[1].append(name)
    return names, groups


def _stack(
    name: str,
    shape: tuple[int, ...],
    by_pattern: Mapping[int, tuple[Any, list[str]]],
    tensors: Mapping[str, StoredTensor],
    transposed: bool,
) -> Stacked | None:
    """A stacked parameter; None if it is converted in another way, or tensors are missing."""
    rule = next(iter(by_pattern.values()))[0]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    if steps not in (_MERGED, _CONCATENATED) or len(rule.target_patterns) != 1 or len(shape) != 3:
        return None
    if len(by_pattern) != len(rule.source_patterns) or (steps == _MERGED and len(by_pattern) > 1):
        return None
    experts, rows, columns = shape
    pieces, row = [], 0
    for _, (_, names) in sorted(by_pattern.items()):
        first = tensors[names[0]].shape
        if len(names) != experts or len(first) != 2 or first[1] != columns:
            return None
        if any(tensors[each].shape != first for each in names):
            return None
        size = (first[0], first[1])
        pieces += [Piece(each, expert, row, size) for expert, each in enumerate(names)]
        row += first[0]
    return (
        Stacked(name, (experts, rows, columns), transposed, tuple(pieces)) if row == rows else None
    )


def _shared(model: Any) -> frozenset[str]:
    """The parameters that have more than one name."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return frozenset((*tied, *tied.values()))


def _kinds(model: Any) -> dict[str, str]:
    """What each module with parameters is."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if next(module.parameters(recurse=False), None) is not None:
            is_linear = isinstance(module, nn.Linear | Conv1D)
            kind = EMBEDDING if isinstance(module, nn.Embedding) else type(module).__name__
            found[name] = LINEAR if is_linear else kind
    return found
