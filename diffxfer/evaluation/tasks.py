"""Finding lm-eval's tasks by name, and telling one state of a task from another."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from diffxfer.evaluation.settings import Settings

_NEAR = 3
_REASON = 200
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
# Where the task's file lies is no part of what it asks.
_NOT_THE_TASK = ("metadata",)


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The tasks of a run, found and loaded once to see that they can be.

    Attributes:
        manager: lm-eval's index of tasks.
        names: what was asked for, patterns replaced by what they match.
        leaves: the tasks that each of those stands for: itself, or a group's.
        groups: the groups that each of those stands for, the outermost first.
        fingerprints: of each of those, by its definition and its questions.
    """

    manager: TaskManager
    names: tuple[str, ...]
    leaves: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    fingerprints: Mapping[str, str]


def find_tasks(settings: Settings, *, fingerprint: bool) -> TaskSet:
    """Find every task, and load its data.

    Args:
        settings: which tasks, and where they are looked for.
        fingerprint: whether scores are to be found again later; it reads all questions.

    Raises:
        EvaluationError: if a task is unknown, or its data cannot be had.
    """
    own = settings.include_path is not None or all(map(_is_file, settings.tasks))
    try:
        return _find(settings, include_defaults=not own, fingerprint=fingerprint)
    except EvaluationError as exc:
        if not own or not isinstance(exc.__cause__, KeyError | ValueError | None):
            raise
        # A task of lm-eval's own, or a group of the user's that speaks of one.
        return _find(settings, include_defaults=True, fingerprint=fingerprint)


def _find(settings: Settings, *, include_defaults: bool, fingerprint: bool) -> TaskSet:
    """As `find_tasks`; reading the index of lm-eval's own tasks takes 6 s."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=settings.include_path,
        include_defaults=include_defaults,
        metadata=dict(settings.model_args),
    )
    names = _resolve(settings.tasks, manager.all_tasks)
    leaves: dict[str, tuple[str, ...]] = {}
    groups: dict[str, tuple[str, ...]] = {}
    fingerprints: dict[str, str] = {}
    for name in names:
        loaded = _load(manager, name)
        leaves[name] = tuple(loaded["tasks"])
        groups[name] = tuple(loaded.get("groups", {}))
        if fingerprint:
            fingerprints[name] = _fingerprint(name, loaded["tasks"], settings)
    return TaskSet(manager, names, leaves, groups, fingerprints)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _resolve(asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """What each name or pattern stands for."""
    from lm_eval.utils import pattern_match

    names: list[str] = []
    for name in asked:
        if _is_file(name):
            found = [str(Path(name).absolute())] if Path(name).is_file() else []
        else:
            found = [name] if name in known else pattern_match([name], known)
        if not found:
            raise _unknown(name, known)
        names += found
    return tuple(dict.fromkeys(names))


def _unknown(name: str, known: Sequence[str]) -> EvaluationError:
    near = get_close_matches(name, known, n=_NEAR, cutoff=0.6)
    remedy = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks prints all"
    if _is_file(name):
        return EvaluationError(name, "is no task file: there is no such file", "check the path")
    return EvaluationError(name, "is no task of lm-eval's or of --include-path", remedy)


def _load(manager: TaskManager, name: str) -> TaskDict:
    try:
        return manager.load([name])
    except Exception as exc:
        reason = next(iter(str(exc).splitlines()), "")[:_REASON] or type(exc).__name__
        if _is_about_data(exc):
            raise EvaluationError(
                name, f"its data cannot be had ({reason})", _data_remedy()
            ) from exc
        remedy = "mend its YAML file, or see the whole of it with DIFFXFER_DEBUG=1"
        raise EvaluationError(name, f"is a task that does not load ({reason})", remedy) from exc


def _is_about_data(exc: BaseException) -> bool:
    """Whether the data set is at fault: it is missing, gated, broken, or out of reach."""
    modules = {kind.__module__.split(".")[0] for kind in type(exc).__mro__}
    return isinstance(exc, OSError) or bool(modules & {"datasets", "huggingface_hub", "httpx2"})


def _data_remedy() -> str:
    offline = [name for name in _OFFLINE if os.environ.get(name, "").lower() in ("1", "true")]
    if offline:
        return f"unset {' and '.join(offline)} once, to let it be downloaded into the cache"
    return "check the connection, the data set's name and paths, or log in: hf auth login"


def _fingerprint(name: str, loaded: Mapping[str, Task], settings: Settings) -> str:
    """A hash of what a task asks: its definition, its questions and its examples."""
    whole = xxhash.xxh3_128(b"" if _is_file(name) else name.encode())
    for task_name, task in sorted(loaded.items()):
        config = {k: v for k, v in task.dump_config().items() if k not in _NOT_THE_TASK}
        whole.update(_text([task_name, config]))
        docs = task.eval_docs
        asked = len(docs) if settings.limit is None else _count(len(docs), settings.limit)
        for i in range(min(asked, len(docs))):
            whole.update(_text(docs[i]))
        shots = settings.num_fewshot
        if shots is None:
            shots = config.get("num_fewshot")
        if shots:
            for doc in task.fewshot_docs():
                whole.update(_text(doc))
    return whole.hexdigest()


def _count(total: int, limit: float) -> int:
    """How many questions lm-eval asks with that limit."""
    return -int(-total * limit // 1) if limit < 1 else int(limit)


def _text(value: Any) -> bytes:
    return json.dumps(value, default=str, sort_keys=True).encode("utf-8", "surrogatepass")
