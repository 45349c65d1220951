"""Finding the tasks of lm-eval by name, and fingerprinting their content."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.errors import EvaluationError, OptionError, first_line
from diffxfer.evaluation.head_labels import not_multiple_choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from diffxfer.evaluation.eval_settings import EvalSettings

_NEAR = 3
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
# The location of the task file does not affect the questions.
_NOT_THE_TASK = ("metadata",)
_CODE = (".py", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class QuestionForm:
    """What a task asks, and how.

    Attributes:
        output_type: as lm-eval names it, such as ``"multiple_choice"``.
        shots: the number of examples before each question.
        choices: the choices of its first question; empty if it is not multiple choice.
    """

    output_type: str
    shots: int
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The tasks of an evaluation, loaded once to check that this is possible.

    Attributes:
        manager: lm-eval's index of tasks.
        names: the requested tasks and groups, with patterns expanded.
        leaves: for each name, its tasks: itself, or those of the group.
        groups: for each name, its groups, the outermost first.
        fingerprints: for each name, a hash of its definition and questions.
        sampled: whether a task samples its answers.
        forms: what each task asks, by its name; empty unless classifiers are asked.
    """

    manager: TaskManager
    names: tuple[str, ...]
    leaves: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    fingerprints: Mapping[str, str]
    sampled: bool
    forms: Mapping[str, QuestionForm]


def find_tasks(settings: EvalSettings, *, fingerprint: bool) -> TaskSet:
    """Find every task, and load its data.

    Args:
        settings: the names of the tasks, and where to find them.
        fingerprint: whether to fingerprint the tasks, which reads all questions.

    Raises:
        EvaluationError: if a task is unknown, its data cannot be loaded, or a classifier cannot
            answer it.
    """
    own = settings.include_path is not None or all(map(_is_file, settings.tasks))
    try:
        found = _find(settings, include_defaults=not own, fingerprint=fingerprint)
    except EvaluationError as exc:
        if not own or not isinstance(exc.__cause__, KeyError | ValueError | None):
            raise
        # It is a built-in task, or a custom group that refers to one.
        found = _find(settings, include_defaults=True, fingerprint=fingerprint)
    _check_forms(found.forms)
    return found


def _find(settings: EvalSettings, *, include_defaults: bool, fingerprint: bool) -> TaskSet:
    """As `find_tasks`; including the index of built-in tasks takes 6 s."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=settings.include_path,
        include_defaults=include_defaults,
        metadata=dict(settings.model_args),
    )
    own = settings.include_path is not None
    names = _resolve(settings.tasks, manager.all_tasks, own=own)
    loaded = {name: _load(manager, name) for name in names}
    leaves = {name: tuple(found["tasks"]) for name, found in loaded.items()}
    _refuse_overlap(leaves)
    fingerprints = {
        name: _fingerprint(name, found, manager, settings)
        for name, found in loaded.items()
        if fingerprint
    }
    groups = {name: tuple(found.get("groups", {})) for name, found in loaded.items()}
    tasks = {leaf: task for found in loaded.values() for leaf, task in found["tasks"].items()}
    sampled = any(_samples(task, settings) for task in tasks.values())
    asked = tasks if settings.is_classifier else {}
    forms = {leaf: _form(task, settings) for leaf, task in asked.items()}
    return TaskSet(manager, names, leaves, groups, fingerprints, sampled, forms)


def _check_forms(forms: Mapping[str, QuestionForm]) -> None:
    """Refuse tasks that are not multiple choice without examples, which classifiers answer."""
    for task, form in forms.items():
        if form.output_type != "multiple_choice":
            raise not_multiple_choice(task, f"has the output_type {form.output_type}")
        if form.shots:
            problem = (
                f"puts {form.shots} examples before each question, but a classifier reads the"
                " question alone"
            )
            raise EvaluationError(task, problem, "give --num-fewshot 0")


def _form(task: Task, settings: EvalSettings) -> QuestionForm:
    kind = str(task.OUTPUT_TYPE)
    own = task.get_config("num_fewshot") or 0
    # lm-eval keeps a task's own number if that is 0.
    shots = own if settings.num_fewshot is None or own == 0 else settings.num_fewshot
    choices = task.doc_to_choice(task.eval_docs[0]) if kind == "multiple_choice" else ()
    return QuestionForm(kind, shots, tuple(map(str, choices)))


def _refuse_overlap(leaves: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for name, tasks in leaves.items():
        for task in tasks:
            if task in seen:
                problem = f"{task} is in {seen[task]} and in {name}"
                raise OptionError("--tasks", problem, "name one of them")
            seen[task] = name


def _samples(task: Task, settings: EvalSettings) -> bool:
    """Whether a task samples its answers."""
    own = task.get_config("generation_kwargs") or {}
    return bool({**own, **settings.gen_kwargs}.get("do_sample"))


def check_task_files(settings: EvalSettings) -> None:
    """Check that task files exist, before the index of thousands of tasks is read.

    Raises:
        EvaluationError: if one is missing.
    """
    for name in settings.tasks:
        if _is_file(name) and not Path(name).is_file():
            raise EvaluationError(name, "no such task file", "check the path")


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _resolve(asked: Sequence[str], known: Sequence[str], *, own: bool) -> tuple[str, ...]:
    """Expand patterns, and check that every name is known."""
    from lm_eval.utils import pattern_match

    names: list[str] = []
    for name in asked:
        if _is_file(name):
            found = [str(Path(name).absolute())]
        else:
            found = [name] if name in known else pattern_match([name], known)
        if not found:
            raise _unknown(name, known, own=own)
        names += found
    return tuple(dict.fromkeys(names))


def _unknown(name: str, known: Sequence[str], *, own: bool) -> EvaluationError:
    near = get_close_matches(name, known, n=_NEAR, cutoff=0.75)
    remedies = [f"did you mean {' or '.join(near)}?"] if near else []
    remedies += [] if own else ["a custom task needs --include-path DIR"]
    where = " and not in --include-path" if own else ""
    remedy = "; ".join(remedies) or "lm-eval ls tasks lists all tasks"
    return EvaluationError(name, f"is not a task of lm-eval{where}", remedy)


def _load(manager: TaskManager, name: str) -> TaskDict:
    try:
        return manager.load([name])
    except (Exception, SystemExit) as exc:
        reason = first_line(exc)
        if isinstance(exc, ImportError):
            package = (exc.name or "").split(".")[0]
            remedy = f"pip install {package}, or the extra of lm-eval, such as lm-eval[ifeval]"
            raise EvaluationError(name, f"needs a package ({reason})", remedy) from exc
        if _is_about_data(exc):
            raise EvaluationError(
                name, f"its data cannot be loaded ({reason})", _data_remedy()
            ) from exc
        remedy = "correct its YAML file; DIFFXFER_DEBUG=1 shows the traceback"
        raise EvaluationError(name, f"cannot be loaded as a task ({reason})", remedy) from exc


def _is_about_data(exc: BaseException) -> bool:
    """Whether the dataset is the cause: it is missing, gated, corrupt or unreachable."""
    modules = {kind.__module__.split(".")[0] for kind in type(exc).__mro__}
    return isinstance(exc, OSError) or bool(
        modules & {"datasets", "huggingface_hub", "httpx", "httpx2"}
    )


def _data_remedy() -> str:
    offline = [name for name in _OFFLINE if os.environ.get(name, "").lower() in ("1", "true")]
    if offline:
        return f"unset {' and '.join(offline)} once, so that it is downloaded into the cache"
    return (
        "check the name of the dataset, its paths (relative to the current folder), or the "
        "connection; a gated dataset needs hf auth login"
    )


def _fingerprint(name: str, found: TaskDict, manager: TaskManager, settings: EvalSettings) -> str:
    """Hash the definition of a task, the code beside it, its questions and examples."""
    whole = xxhash.xxh3_128()
    names = [name, *found["tasks"], *found.get("groups", {})]
    for folder in sorted({_task_folder(each, manager) for each in names} - {None}, key=str):
        for path in sorted(Path(str(folder)).iterdir()):
            if path.suffix in _CODE and path.is_file():
                whole.update(path.name.encode() + xxhash.xxh3_128_digest(path.read_bytes()))
    for task_name, task in sorted(found["tasks"].items()):
        config = {k: v for k, v in task.dump_config().items() if k not in _NOT_THE_TASK}
        whole.update(_as_bytes([task_name, config]))
        docs = task.eval_docs
        asked = len(docs) if settings.limit is None else _count(len(docs), settings.limit)
        for i in range(min(asked, len(docs))):
            whole.update(_as_bytes(docs[i]))
        shots = settings.num_fewshot
        if shots is None:
            shots = config.get("num_fewshot")
        if shots:
            for doc in task.fewshot_docs():
                whole.update(_as_bytes(doc))
    return whole.hexdigest()


def _task_folder(name: str, manager: TaskManager) -> Path | None:
    """The folder of the YAML file of a task or group, and of the code that it uses."""
    if _is_file(name):
        return Path(name).parent
    entry = manager.task_index.get(name)
    path = None if entry is None else entry.yaml_path
    return None if path is None else Path(path).parent


def _count(total: int, limit: float) -> int:
    """The number of questions that lm-eval asks with a limit."""
    return -int(-total * limit // 1) if limit < 1 else int(limit)


def _as_bytes(value: Any) -> bytes:
    return json.dumps(value, default=str, sort_keys=True).encode("utf-8", "surrogatepass")
