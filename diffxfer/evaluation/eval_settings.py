"""The options of lm-eval under their own names, validated before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Seeds: TypeAlias = tuple[int | None, int | None, int | None, int | None]
"""For Python, numpy, torch and the choice of few-shot examples."""

DEFAULT_SEEDS: Seeds = (0, 1234, 1234, 1234)
HF_BACKENDS = ("hf", "hf-auto", "huggingface")
CLASSIFIER_BACKENDS = ("classifier", "diffxfer-classifier")
"""Our backend for classifiers, and its name in lm-eval."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_ARGS_IN_MEMORY = frozenset(
    (
        "add_bos_token",
        "attn_implementation",
        "backend",
        "chat_template_args",
        "enable_thinking",
        "logits_cache",
        "max_batch_size",
        "max_length",
        "mixed_precision_dtype",
        "prefix_token_id",
        "softmax_dtype",
        "think_end_token",
        "tokenizer",
        "truncation",
        "use_fast_tokenizer",
    )
)
"""Options of the backend that do not need a folder of weights."""
_CLASSIFIER_ARGS = ("attn_implementation", "max_length", "pair_separator")
_TASK_FIELDS = ("tasks", "include_path")
_REMOTE = ("-completions", "-chat")
_RESERVED_MODEL_ARGS = {
    "pretrained": "give the models as arguments",
    "device": "give --device",
    "dtype": "give --dtype",
    "batch_size": "give --batch-size",
    "trust_remote_code": "give --trust-remote-code",
}


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """How models are scored.

    Attributes:
        tasks: names of tasks, groups or tags, patterns, or YAML files.
        include_path: a folder of custom tasks.
        num_fewshot: examples before each question; None for the default of the task.
        limit: questions per task, or the share of them if below 1; None for all.
        batch_size: questions per batch, ``"auto"``, or ``"auto:N"``.
        device: such as ``"cuda:0"``; None for the default of the backend.
        dtype: the dtype of the loaded model; ``"auto"`` for that of the checkpoint.
        apply_chat_template: whether questions are formatted with the chat template of the model.
        fewshot_as_multiturn: whether examples are turns of a conversation.
        system_instruction: the system prompt.
        gen_kwargs: generation options, which override those of the task.
        backend: the name of the backend in lm-eval.
        model_args: options for the backend.
        seeds: see `Seeds`.
        trust_remote_code: whether code in a checkpoint may be executed.
    """

    tasks: tuple[str, ...]
    include_path: Path | None
    num_fewshot: int | None
    limit: float | None
    batch_size: int | str
    device: str | None
    dtype: str
    apply_chat_template: bool
    fewshot_as_multiturn: bool
    system_instruction: str | None
    gen_kwargs: Mapping[str, Any]
    backend: str
    model_args: Mapping[str, Any]
    seeds: Seeds
    trust_remote_code: bool

    @property
    def reads_folders(self) -> bool:
        """Whether the backend loads a model from a folder instead of asking a server."""
        return not self.backend.endswith(_REMOTE)

    @property
    def is_hf(self) -> bool:
        """Whether lm-eval's own backend for transformers runs a language model."""
        return self.backend in HF_BACKENDS

    @property
    def is_classifier(self) -> bool:
        """Whether our backend runs a classifier."""
        return self.backend in CLASSIFIER_BACKENDS

    @property
    def in_process(self) -> bool:
        """Whether transformers runs the model in this process."""
        return self.is_hf or self.is_classifier

    @property
    def added(self) -> str:
        """What grafts do with a head that fine-tuning added: a classifier's is what is scored."""
        return "bring" if self.is_classifier else "refuse"

    @property
    def grafts_in_memory(self) -> bool:
        """Whether a graft is loaded without being written; other options need its folder."""
        if self.is_classifier:
            return True
        known = self.model_args.keys() <= _ARGS_IN_MEMORY
        return self.is_hf and known and not self.trust_remote_code

    @property
    def resolved_device(self) -> str | None:
        """The device, by default a GPU if there is one; lm-eval would always default to CUDA."""
        if self.device is not None or not self.in_process:
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def cache_key_fields(self) -> dict[str, Any]:
        """Everything but the tasks that a score depends on, as JSON values."""
        names = [field.name for field in fields(self) if field.name not in _TASK_FIELDS]
        paths = [value for value in self.model_args.values() if isinstance(value, str)]
        return {
            **{name: getattr(self, name) for name in names},
            "device": self.resolved_device,
            "files": {path: _files(Path(path)) for path in paths if Path(path).exists()},
        }


def make_settings(
    *,
    tasks: Sequence[str] | str,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: float | None,
    batch_size: int | str,
    device: str | None,
    dtype: str,
    apply_chat_template: bool,
    fewshot_as_multiturn: bool | None,
    system_instruction: str | None,
    gen_kwargs: str | Mapping[str, Any] | None,
    backend: str,
    model_args: str | Mapping[str, Any] | None,
    seed: str | int | Sequence[int | None] | None,
    trust_remote_code: bool,
) -> EvalSettings:
    """Validate and normalise the options of an evaluation.

    Args:
        tasks: see `EvalSettings`; a list, or one string with commas.
        include_path: see `EvalSettings`.
        num_fewshot: see `EvalSettings`.
        limit: see `EvalSettings`.
        batch_size: see `EvalSettings`.
        device: see `EvalSettings`.
        dtype: see `EvalSettings`.
        apply_chat_template: see `EvalSettings`.
        fewshot_as_multiturn: None for yes with a chat template and no without one.
        system_instruction: see `EvalSettings`.
        gen_kwargs: see `EvalSettings`; or ``"key=value,key=value"``.
        backend: see `EvalSettings`.
        model_args: see `EvalSettings`; or ``"key=value,key=value"``.
        seed: one number, or four, or a string of these with commas; None for lm-eval's default.
        trust_remote_code: see `EvalSettings`.

    Raises:
        OptionError: for the first invalid option.
    """
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not names:
        raise OptionError("--tasks", "names no task", "give one or more, such as gsm8k")
    if include_path is not None and not include_path.is_dir():
        problem = f"{include_path} is not a folder"
        raise OptionError("--include-path", problem, "give the folder of your tasks' YAML files")
    if num_fewshot is not None and num_fewshot < 0:
        raise OptionError("--num-fewshot", f"{num_fewshot} is below 0", "give 0 or more")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        problem = f"{limit:g} is neither a number of questions nor a share"
        raise OptionError("--limit", problem, "give a whole number, or a share between 0 and 1")
    if fewshot_as_multiturn and not apply_chat_template:
        problem = "needs a chat template"
        raise OptionError("--fewshot-as-multiturn", problem, "give --apply-chat-template too")
    if backend in (*HF_BACKENDS, *CLASSIFIER_BACKENDS) and dtype not in DTYPES:
        problem = f"{dtype!r} is unknown"
        raise OptionError("--dtype", problem, f"use one of {', '.join(DTYPES)}")
    settings = EvalSettings(
        tasks=names,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=None if limit is None else float(limit),
        batch_size=_batch_size(batch_size),
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=(
            apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn
        ),
        system_instruction=system_instruction,
        gen_kwargs=_arguments("--gen-kwargs", gen_kwargs),
        backend=backend,
        model_args=_model_args(model_args),
        seeds=_seeds(seed),
        trust_remote_code=trust_remote_code,
    )
    if settings.is_classifier:
        _check_classifier_options(settings)
    return settings


def _check_classifier_options(settings: EvalSettings) -> None:
    """Refuse options that a classifier has no use for: it reads one text and names a class."""
    for option, given in (
        ("--apply-chat-template", settings.apply_chat_template),
        ("--system-instruction", settings.system_instruction is not None),
        ("--num-fewshot", bool(settings.num_fewshot)),
        ("--gen-kwargs", bool(settings.gen_kwargs)),
        ("--trust-remote-code", settings.trust_remote_code),
    ):
        if given:
            problem = f"has no meaning for the backend {settings.backend}"
            raise OptionError(option, problem, "omit it")
    for name, value in settings.model_args.items():
        if name not in _CLASSIFIER_ARGS:
            problem = f"the backend {settings.backend} has no argument {name}"
            remedy = f"give one of {', '.join(_CLASSIFIER_ARGS)}"
            raise OptionError("--model-args", problem, remedy)
        if name == "max_length" and not (type(value) is int and value > 0):
            problem = f"max_length is {value!r}, expected a number of tokens"
            raise OptionError("--model-args", problem, "give 1 or more")


def _files(path: Path) -> list[tuple[str, int, int]]:
    """The names, sizes and dates of the files at a path that a model argument names."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(each.relative_to(path)), each.stat()) for each in found if each.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]


def _batch_size(value: int | str) -> int | str:
    text = str(value)
    if text == "auto" or (text.startswith("auto:") and text[5:].isdecimal()):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(
            "--batch-size", f"{text!r} is not a batch size", "give 1 or more, or auto"
        )
    return int(text)


def _arguments(option: str, given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse ``key=value,key=value`` as lm-eval does."""
    if given is None or not isinstance(given, str):
        return dict(given or {})
    for part in filter(None, given.split(",")):
        key, equals, _ = part.partition("=")
        if not key.strip() or not equals:
            problem = f"{part!r} is not of the form key=value"
            raise OptionError(option, problem, "give pairs with commas, as in a=1,b=2")
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(given))


def _model_args(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    found = _arguments("--model-args", given)
    for key, remedy in _RESERVED_MODEL_ARGS.items():
        if key in found:
            raise OptionError("--model-args", f"{key} has a separate option", remedy)
    return found


def _seeds(given: str | int | Sequence[int | None] | None) -> Seeds:
    if given is None:
        return DEFAULT_SEEDS
    if isinstance(given, int):
        values: list[int | None] = [_seed(str(given))]
    elif isinstance(given, str):
        values = [_seed(part.strip()) for part in given.split(",")]
    else:
        values = list(given)
    if len(values) == 1:
        values *= 4
    if len(values) != 4:
        problem = f"{len(values)} numbers, expected 1 or 4"
        raise OptionError("--seed", problem, "give one, or four: Python, numpy, torch, few-shot")
    return values[0], values[1], values[2], values[3]


def _seed(text: str) -> int | None:
    if text == "None":
        return None
    if not text.isdecimal() or int(text) >= 1 << 32:
        problem = f"{text!r} is not a seed"
        raise OptionError("--seed", problem, "give whole numbers below 2³², as in 0,1,2,3")
    return int(text)
