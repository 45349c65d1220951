"""Loading a source of weights into a transformers model, tensor by tensor.

transformers reads each tensor when it is placed, and renames, fuses and converts it as it does for
a folder. So the memory that is needed is the model and a few tensors, and nothing is written.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from diffxfer.checkpoints.companions import companion_path
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.errors import CheckpointError, DiffxferError, first_line, listed
from diffxfer.models.memory import is_out_of_memory, return_memory
from diffxfer.models.tensors import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from diffxfer.models.source import ModelSource

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
"""The exceptions that transformers raises for invalid configs and files."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
_NEWER = "try a newer version of transformers"
_SAVE = "save it with save_pretrained first"
_KEYS = (
    ("unexpected_keys", "has tensors that transformers ignores", _SAVE),
    ("missing_keys", "lacks tensors that transformers expects", _SAVE),
    ("mismatched_keys", "has tensors whose shape config.json does not give", "correct that file"),
)


class LoadedModel(NamedTuple):
    """A model in memory.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer, with the chat template; None if it has none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load(
    source: ModelSource,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    auto: type | None = None,
    attn_implementation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a source as a transformers model with its tokenizer; code in it is not executed.

    Args:
        source: the weights.
        dtype: the dtype in memory; None for that of the config, or else of the weights.
        device: where the model is placed; None for the CPU.
        auto: the auto class of transformers; None for the one that the config's architecture needs.
        attn_implementation: as for `from_pretrained`.
        progress: called with the bytes of weights that are loaded, and the total.

    Raises:
        CheckpointError: if transformers cannot load it, ignores tensors or initialises new ones.
        DiffxferError: if a tensor cannot be made.
    """
    with _translate_errors(source):
        model, info = load_weights(
            *(source, dtype, device, auto, progress),
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # they are refused with their names
        )
    _refuse_other_tensors(source, info)
    return LoadedModel(model, load_tokenizer(source))


def load_weights(
    source: ModelSource,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    auto: type | None,
    progress: Callable[[int, int], None] | None,
    **options: Any,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a source as a transformers model.

    Args:
        source: the weights.
        dtype: as for `load`.
        device: as for `load`.
        auto: as for `load`.
        progress: as for `load`.
        options: further arguments of `from_pretrained`; those that are None are left out.

    Returns:
        The model, and what transformers says about missing and unexpected tensors.

    Raises:
        DiffxferError: if a tensor cannot be made. Exceptions of transformers are not translated.
    """
    from transformers import AutoConfig

    given = {name: value for name, value in options.items() if value is not None}
    if device is not None:
        given["device_map"] = {"": str(device)}
    config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    model_class, config = _model_class(auto or auto_class(config), config)
    loaded: Any = model_class.from_pretrained(
        None,
        config=config,
        state_dict=_Weights(source, progress).tensors,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
        **given,
    )
    model: PreTrainedModel = loaded[0]
    model.config.name_or_path = model.name_or_path = source.label
    _set_generation_config(model, source)
    return model, loaded[1]


def auto_class(config: Any) -> type:
    """The auto class of transformers for a config, by the name of its architecture.

    Args:
        config: a config of transformers.

    Returns:
        The class for a causal LM, a masked LM, a sequence classifier or a seq2seq model; else
        `AutoModel`.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    names = config.architectures or ("",)
    for kind, auto in (
        ("CAUSAL_LM", "CausalLM"),
        ("MASKED_LM", "MaskedLM"),
        ("SEQUENCE_CLASSIFICATION", "SequenceClassification"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "Seq2SeqLM"),
    ):
        classes = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").get(config.model_type)
        if names[0] in ((classes,) if isinstance(classes, str) else classes or ()):
            found: type = getattr(transformers, f"AutoModelFor{auto}")
            return found
    return transformers.AutoModel


def _model_class(auto: Any, config: Any) -> tuple[Any, Any]:
    """The class that an auto class chooses for a config, and the part of the config for it."""
    from transformers.models.auto.auto_factory import _get_model_class

    if type(config) not in auto._model_mapping:
        raise ValueError(f"{auto.__name__} has no class for {type(config).__name__}")
    choose: Any = _get_model_class
    found: Any = choose(config, auto._model_mapping)
    text = config.sub_configs.get("text_config")
    if text is not None and found.config_class == text:
        config = config.get_text_config()
    return found, config


def refill(loaded: LoadedModel, source: ModelSource) -> None:
    """Replace the weights of a loaded model by those of another source with the same tensors.

    The model is not built again, and keeps its device and dtypes. The old weights are freed first,
    so the memory that is needed is one model. Parameters are new objects afterwards: references
    to the old ones are outdated.

    Args:
        loaded: the model, from `load`.
        source: the weights.

    Raises:
        CheckpointError: if transformers cannot load it, ignores tensors or lacks some.
        DiffxferError: if a tensor cannot be made. After a failure the model cannot be used.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    model: Any = loaded.model
    with _translate_errors(source):
        weights = _Weights(source, None)
        conversions: Any = get_model_conversion_mapping(model)
        config = LoadStateDictConfig(
            device_map={"": model.device},
            dtype=model.dtype,
            weight_mapping=conversions,
        )
        _free_parameters(model)
        info, _ = convert_and_load_state_dict_in_model(model, weights.tensors, config)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        model.eval()
    info.missing_keys |= {name for name, found in model.named_parameters() if found.is_meta}
    _refuse_other_tensors(source, info.to_dict())
    model.config.name_or_path = model.name_or_path = source.label


def _free_parameters(model: Any) -> None:
    """Replace every parameter by one without memory; buffers stay."""
    import torch

    for module in model.modules():
        for name, found in module.named_parameters(recurse=False):
            empty = torch.empty_like(found, device="meta")
            made = torch.nn.Parameter(empty, requires_grad=found.requires_grad)
            setattr(module, name, made)
    del found
    return_memory()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a source with its chat template; None if it has none.

    Args:
        source: the model.

    Raises:
        CheckpointError: if transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(source.folder):
        return None
    try:
        found: Any = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except LOAD_ERRORS as exc:
        problem = f"has no tokenizer that transformers can load ({first_line(exc)})"
        raise CheckpointError(source.label, problem, "check its tokenizer files") from exc
    found.name_or_path = source.label
    tokenizer: PreTrainedTokenizerBase = found
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer.

    Args:
        folder: of a model.
    """
    return any(companion_path(folder, name) for name in _TOKENIZER_FILES)


class _Weights:
    """The tensors of a source, each made when transformers takes it.

    Args:
        source: the source.
        progress: called with the bytes made and the total.
    """

    def __init__(self, source: ModelSource, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self.source = source
        self.tensors = {name: _Lazy(self, name) for name in source.names()}
        self._total = sum(tensor.nbytes for tensor in self.tensors.values())

    def make(self, name: str, nbytes: int) -> torch.Tensor:
        found = self.source.tensor(name)
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)
        return found


class _Lazy:
    """A tensor that is not made yet, as safetensors' slices are; transformers takes all of it."""

    def __init__(self, weights: _Weights, name: str) -> None:
        found = torch_dtype(weights.source.dtype(name))
        if found is None:
            problem = f"{name} is {weights.source.dtype(name)}, which PyTorch does not have"
            raise CheckpointError(weights.source.label, problem, "give a checkpoint of floats")
        self._weights = weights
        self._name = name
        self.dtype = found
        self.shape = weights.source.shape(name)

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def is_floating_point(self) -> bool:
        return self._weights.source.dtype(self._name) in FLOATS

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, place: Any) -> torch.Tensor:
        return self._weights.make(self._name, self.nbytes)[place]


def _set_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """Set it as `from_pretrained` does with a folder, from the file or else from the config."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    given: dict[str, Any] = {}
    if companion_path(source.folder, "generation_config.json") is None:
        given = {"config_file_name": "config.json", "_from_model_config": True}
    model.generation_config = GenerationConfig.from_pretrained(
        source.folder, local_files_only=True, **given
    )


def _refuse_other_tensors(source: ModelSource, info: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers does not use exactly the tensors."""
    for kind, what, remedy in _KEYS:
        if info[kind]:
            names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[kind])
            problem = f"{what}, so another model would be loaded: {listed(names)}"
            raise CheckpointError(source.label, problem, remedy)


@contextmanager
def _translate_errors(source: ModelSource) -> Iterator[None]:
    """Convert exceptions of transformers to one-line errors."""
    try:
        yield
    except DiffxferError:
        raise
    except LOAD_ERRORS as exc:
        problem, remedy = f"cannot be loaded by transformers ({first_line(exc)})", _NEWER
        if is_out_of_memory(exc):
            problem = f"does not fit in memory ({first_line(exc)})"
            remedy = "give dtype='bfloat16', or a device with more memory"
        raise CheckpointError(source.label, problem, remedy) from exc
