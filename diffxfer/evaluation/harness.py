"""Scoring one model with lm-eval, with one-line errors.

lm-eval defines what a task is, how it is asked, and how answers are scored; see
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.artifact.manifest import read_manifest
from diffxfer.diffs.matching.names import is_embedding
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import DiffxferError, EvaluationError, OptionError, first_line
from diffxfer.evaluation.eval_settings import CLASSIFIER_BACKENDS
from diffxfer.evaluation.in_memory import make_backend, make_classifier
from diffxfer.models.memory import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker

    from diffxfer.checkpoints.resolve import Place
    from diffxfer.checkpoints.weights import Weights
    from diffxfer.evaluation.eval_settings import EvalSettings
    from diffxfer.evaluation.lm_eval_tasks import TaskSet
    from diffxfer.models.source import ModelSource

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
_IMPORTABLE_BACKENDS = ("vllm", "sglang")


def check_model(place: Place) -> Weights:
    """Check that a checkpoint can be scored.

    Args:
        place: the location of the checkpoint.

    Returns:
        Its tensors.

    Raises:
        DiffxferError: if it is not a model, or its tokenizer is larger than its embedding.
    """
    folder = place.folder
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind == "diff":
        raise EvaluationError(folder, "is a diff vector, expected a model", "give it with --diff")
    weights = open_weights(place)
    tensors = weights.tensors
    tokenizer = read_tokenizer(folder)
    rows = [spec.shape[0] for name, spec in tensors.items() if is_embedding(name) and spec.shape]
    tokens = 0 if tokenizer is None else len(tokenizer.tokens)
    if rows and tokens > max(rows):
        raise EvaluationError(
            folder,
            f"its tokenizer has {tokens:,} tokens, but its embedding has {max(rows):,} rows",
            "use the tokenizer of the model, or call model.resize_token_embeddings(len(tokenizer))",
        )
    return weights


def lacks_chat_template(folder: Path) -> bool:
    """Whether a model has a readable tokenizer without a chat template.

    Args:
        folder: a checkpoint, or the companions of a diff vector.
    """
    tokenizer = read_tokenizer(folder)
    return tokenizer is not None and not tokenizer.chat_templates


def missing_template_error(label: str, *, has_diff: bool) -> EvaluationError:
    """The error for a model without the requested chat template.

    Args:
        label: the model.
        has_diff: whether there is a diff vector, which has the template of finetuned.
    """
    remedy = "omit that option, or give --diff, whose chat template is then used"
    if has_diff:
        remedy = f"omit it, or add the template: diffxfer apply DIFF {label} --alpha 0 -o OUT"
    problem = "has no chat template, which --apply-chat-template requires"
    return EvaluationError(label, problem, remedy)


def check_device(settings: EvalSettings) -> None:
    """Check that the device exists.

    Raises:
        OptionError: if torch does not know the name.
        EvaluationError: if torch does not find the device.
    """
    if settings.device is not None and settings.in_process:
        check_device_name(settings.device)


def check_device_name(device: str) -> None:
    """Check that a device exists.

    Args:
        device: as PyTorch names it.

    Raises:
        OptionError: if torch does not know the name.
        EvaluationError: if torch does not find the device.
    """
    import torch

    kind = parse_device(device)
    found = torch.cuda.device_count() if kind.type == "cuda" else 1
    if kind.type == "cuda" and (kind.index or 0) >= found:
        have = f"finds {found} CUDA devices" if found else "finds no CUDA device"
        problem = f"{device}: PyTorch {torch.__version__} {have}"
        raise EvaluationError("--device", problem, "give --device cpu, or check nvidia-smi")
    if kind.type == "mps" and not torch.backends.mps.is_available():
        raise EvaluationError("--device", "PyTorch finds no mps device", "give --device cpu")


def parse_device(name: str) -> torch.device:
    """The device that PyTorch knows by a name.

    Raises:
        OptionError: if torch does not know the name.
    """
    import torch

    try:
        return torch.device(name)
    except RuntimeError as exc:
        problem = f"{short(name)} is not a device"
        raise OptionError("--device", problem, "give cpu, cuda, cuda:0 or mps") from exc


def score(
    model: str,
    label: str,
    tasks: TaskSet,
    names: Sequence[str],
    settings: EvalSettings,
    tracker: EvaluationTracker | None,
    source: ModelSource | None = None,
    moved: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score a model on tasks.

    Args:
        model: its folder, or its name on the server of a remote backend.
        label: its name for the user.
        tasks: the task set.
        names: the tasks to score.
        settings: how to score.
        tracker: lm-eval's writer of result files; None to write none.
        source: the weights of a model in memory, whose folder has none; else None.
        moved: called with the bytes of it that are loaded, and the total.
        warn: called with a line about texts that were truncated.

    Returns:
        The results of lm-eval, including samples.

    Raises:
        EvaluationError: if lm-eval fails.
    """
    model_args = _model_args(model, settings)
    with _translate_errors(label, settings):
        backend: str | LM = settings.backend
        if settings.is_classifier:
            backend = make_classifier(source or model, settings, moved, warn)
        elif source is not None:
            backend = make_backend(source, model_args, settings, moved)
        results = _ask(backend, model_args, tasks, names, settings, tracker)
        backend = settings.backend  # drops the model
    free_memory()
    if results is None:
        problem = "is being scored by several processes, and this is not the first one"
        raise EvaluationError(
            label, problem, "run a single process; --model-args parallelize=True uses several GPUs"
        )
    return _with_backend(results, settings.backend, tracker)


def _with_backend(results: Any, backend: str, tracker: EvaluationTracker | None) -> dict[str, Any]:
    """Record the backend's name, which lm-eval does not know if the backend was made before."""
    results["config"]["model"] = backend
    if tracker is not None:
        tracker.general_config_tracker.model_source = backend
    return dict(results)


def score_loaded(
    model: Any, tokenizer: Any, label: str, tasks: TaskSet, settings: EvalSettings
) -> dict[str, Any]:
    """Score a transformers model that is loaded already.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        label: its name for the user.
        tasks: the task set.
        settings: how to score.

    Returns:
        The results of lm-eval, including samples.

    Raises:
        EvaluationError: if lm-eval fails.
    """
    from lm_eval.models.huggingface import HFLM

    with _translate_errors(label, settings):
        backend = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            device=str(model.device),
        )
        found = _ask(backend, {}, tasks, tasks.names, settings, None)
    assert found is not None, "one process"
    return dict(found)


def _ask(
    backend: str | LM,
    model_args: Mapping[str, Any],
    tasks: TaskSet,
    names: Sequence[str],
    settings: EvalSettings,
    tracker: EvaluationTracker | None,
) -> dict[str, Any] | None:
    """Let lm-eval ask a model; None in all processes but the first."""
    from lm_eval import simple_evaluate

    found: dict[str, Any] | None = simple_evaluate(
        model=backend,
        model_args=dict(model_args),
        tasks=list(names),
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        device=settings.resolved_device,
        limit=settings.limit,
        log_samples=True,
        evaluation_tracker=tracker,
        system_instruction=settings.system_instruction,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
        gen_kwargs=dict(settings.gen_kwargs) or None,
        task_manager=tasks.manager,
        **dict(zip(_SEEDS, settings.seeds, strict=True)),
    )
    return found


def _model_args(model: str, settings: EvalSettings) -> dict[str, Any]:
    args: dict[str, Any] = {"pretrained": model, **settings.model_args}
    if settings.dtype != "auto":
        args["dtype"] = settings.dtype
    if settings.trust_remote_code:
        args["trust_remote_code"] = True
    return args


@contextmanager
def _translate_errors(label: str, settings: EvalSettings) -> Iterator[None]:
    """Convert exceptions of lm-eval and its libraries to one-line errors."""
    try:
        yield
    except DiffxferError:
        raise
    except (Exception, SystemExit) as exc:
        free_memory()
        reason = first_line(exc)
        if is_out_of_memory(exc):
            problem = f"does not fit in memory at batch size {settings.batch_size} ({reason})"
            remedy = (
                "give a smaller --batch-size (or auto), --dtype bfloat16, or use several GPUs with "
                "--model-args parallelize=True"
            )
            raise EvaluationError(label, problem, remedy) from exc
        if isinstance(exc, ImportError):
            problem = f"the backend {settings.backend} cannot be imported ({reason})"
            raise EvaluationError(label, problem, _install_hint(settings)) from exc
        remedy = "set DIFFXFER_DEBUG=1 for the traceback"
        if "max tokens to generate" in reason:
            remedy = "generate fewer tokens, as in --gen-kwargs max_gen_toks=64"
        raise EvaluationError(label, f"lm-eval could not score it ({reason})", remedy) from exc


def _install_hint(settings: EvalSettings) -> str:
    extra = settings.backend if settings.reads_folders else "api"
    return f"install it: pip install 'lm-eval[{extra}]'"


def check_backend(settings: EvalSettings) -> None:
    """Check that lm-eval has the backend and that its library is installed.

    Raises:
        OptionError: if lm-eval has no such backend.
        EvaluationError: if its library is not installed.
    """
    from difflib import get_close_matches

    import lm_eval.models  # noqa: F401 the import registers the backends
    from lm_eval.api.registry import model_registry

    known = sorted({*model_registry.keys(), *CLASSIFIER_BACKENDS})
    if settings.backend not in known:
        near = get_close_matches(settings.backend, known, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else "give one such as hf or vllm"
        raise OptionError("--backend", f"lm-eval has no {short(settings.backend)}", remedy)
    if settings.backend in _IMPORTABLE_BACKENDS and find_spec(settings.backend) is None:
        raise EvaluationError(
            "--backend", f"{settings.backend} is not installed", _install_hint(settings)
        )
