"""Scoring models and grafts side by side."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.diffs.graft import apply_diff
from diffxfer.evaluation.identity import content_key
from diffxfer.evaluation.rows import Scored, best_alpha, compare_models, shown_columns
from diffxfer.evaluation.scores import Evaluation, Score
from diffxfer.evaluation.scratch import scratch_folder
from diffxfer.evaluation.settings import Settings, make_settings
from diffxfer.evaluation.subjects import Subject, lend_templates, make_subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffxfer.evaluation.store import Store
    from diffxfer.evaluation.tasks import TaskSet


@dataclass(frozen=True, slots=True)
class _Run:
    """One call of `evaluate`: what was asked, checked."""

    subjects: tuple[Subject, ...]
    target: str
    baseline: str
    finetuned: str | None
    diff: Path | None
    settings: Settings
    tasks: TaskSet
    store: Store | None
    began: float
    contents: dict[Path, str] = field(default_factory=dict)

    def so_far(self, models: Sequence[Scored]) -> Evaluation:
        """What is known once these models are scored."""
        rows = compare_models(
            models, target=self.target, baseline=self.baseline, finetuned=self.finetuned
        )
        columns = shown_columns(self.tasks, models)
        return Evaluation(
            rows=rows,
            baseline=self.baseline,
            finetuned=self.finetuned,
            columns=columns,
            best=best_alpha(rows, columns, str(self.diff), self.target) if columns else None,
            reused=tuple(
                str(Subject(model.label, self.diff, model.alpha))
                for model in models
                if model.reused
            ),
            warnings=() if self.store is None else tuple(self.store.warnings),
            output=None if self.store is None else self.store.folder,
            elapsed_s=time.perf_counter() - self.began,
        )


def evaluate(
    models: Sequence[Path | str] | Path | str,
    *,
    tasks: Sequence[str] | str,
    baseline: Path | str | None = None,
    finetuned: Path | str | None = None,
    diff: Path | str | None = None,
    alpha: Sequence[float] | float = (1.0,),
    include_path: Path | str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    gen_kwargs: str | Mapping[str, Any] | None = None,
    backend: str = "hf",
    model_args: str | Mapping[str, Any] | None = None,
    seed: str | int | Sequence[int | None] | None = None,
    trust_remote_code: bool = False,
    output: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
    salvage: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """Score models with lm-eval, and compare them on the same questions.

    Args:
        models: folders of models; the first is the target that others are to improve.
        tasks: names of lm-eval's tasks, groups or tags, patterns, or YAML files.
        baseline: the model to compare with; the first one by default.
        finetuned: the directly fine-tuned target, whose gain grafts are to recover.
        diff: a diff vector to graft on the first model.
        alpha: scales of the diff vector, each of which makes a graft to score.
        include_path: a folder of tasks of your own.
        num_fewshot: examples before each question; None for what the task says.
        limit: questions a task, or below 1 the share of them.
        batch_size: questions at a time, ``"auto"``, or ``"auto:N"``.
        device: such as ``"cuda:0"``; None for a GPU where there is one.
        dtype: of the loaded model; ``"auto"`` for the checkpoint's own.
        apply_chat_template: put questions in the model's chat template.
        fewshot_as_multiturn: examples as turns of a conversation; None: with a chat template.
        system_instruction: what the conversation begins with.
        gen_kwargs: how text is generated: a mapping, or ``"key=value,key=value"``.
        backend: what runs the model: ``"hf"``, ``"vllm"``, or another of lm-eval's.
        model_args: passed on to the backend: a mapping, or ``"key=value,key=value"``.
        seed: one number, or four: for Python, numpy, torch and the choice of examples.
        trust_remote_code: let code of a checkpoint run.
        output: a folder for lm-eval's files and `comparison.json`; what it holds is not done again.
        progress: called with a line on what is done next.
        salvage: called with what was scored, when a failure ends it early.

    Returns:
        A row for each model, task and metric.

    Raises:
        DiffxferError: for every known failure; what was scored is in `output` then.

    Example:
        >>> evaluate(["llama-3.1", "grafted"], tasks=["gsm8k"])  # doctest: +SKIP
    """
    began = time.perf_counter()
    settings = make_settings(
        tasks=[tasks] if isinstance(tasks, str) else tasks,
        include_path=None if include_path is None else Path(include_path),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        system_instruction=system_instruction,
        gen_kwargs=gen_kwargs,
        backend=backend,
        model_args=model_args,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    named = [models] if isinstance(models, str | Path) else list(models)
    alphas = [alpha] if isinstance(alpha, int | float) else list(alpha)
    subjects = make_subjects(named, baseline, finetuned, diff, alphas, settings)
    tell = progress or _nobody_listens
    run = _prepare(subjects, baseline, finetuned, diff, settings, output, began, tell)
    done: list[Scored] = []
    try:
        for number, subject in enumerate(run.subjects, 1):
            done.append(_score(subject, run, f"{number} of {len(subjects)}", tell))
    except BaseException:
        if salvage is not None and done:
            salvage(run.so_far(done))
        raise
    evaluation = run.so_far(done)
    if run.store is not None:
        run.store.write_comparison(evaluation.as_json())
    return evaluation


def _nobody_listens(line: str) -> None:
    del line


def _prepare(
    subjects: Sequence[Subject],
    baseline: Path | str | None,
    finetuned: Path | str | None,
    diff: Path | str | None,
    settings: Settings,
    output: Path | str | None,
    began: float,
    tell: Callable[[str], None],
) -> _Run:
    """Check everything that can be checked before the first model is scored."""
    from diffxfer.diffs.artifact.manifest import require_diff
    from diffxfer.evaluation.harness import check_backend, check_device, check_model
    from diffxfer.evaluation.store import Store
    from diffxfer.evaluation.tasks import find_tasks

    if diff is not None:
        require_diff(Path(diff))
    if settings.reads_folders:
        for label in {subject.label: None for subject in subjects}:
            check_model(Path(label))
        subjects = lend_templates(subjects, settings, tell)
    check_backend(settings)
    check_device(settings)
    store = None if output is None else Store(Path(output))
    tell(f"loading {', '.join(settings.tasks)}")
    target = subjects[0].label
    return _Run(
        subjects=tuple(subjects),
        target=target,
        baseline=target if baseline is None else str(baseline),
        finetuned=None if finetuned is None else str(finetuned),
        diff=None if diff is None else Path(diff),
        settings=settings,
        tasks=find_tasks(settings, fingerprint=store is not None),
        store=store,
        began=began,
    )


def _score(subject: Subject, run: _Run, place: str, tell: Callable[[str], None]) -> Scored:
    """Score one subject on the tasks that it was not scored on before."""
    keys = _keys(subject, run, tell)
    known: dict[str, list[Score]] = {}
    if run.store is not None:
        found = {name: run.store.find(key) for name, key in keys.items() if key is not None}
        known = {name: scores for name, scores in found.items() if scores is not None}
        if known:
            tell(f"{subject}: scores on {', '.join(known)} are reused from {run.store.folder}")
    reused = bool(known)
    missing = [name for name in run.tasks.names if name not in known]
    if missing:
        tell(f"scoring {subject} ({place}) on {', '.join(missing)}")
        known |= _ask(subject, missing, keys, run)
    scores = {found.column: found for name in run.tasks.names for found in known[name]}
    return Scored(subject.label, subject.alpha, tuple(scores.values()), reused)


def _ask(
    subject: Subject, names: Sequence[str], keys: Mapping[str, str | None], run: _Run
) -> dict[str, list[Score]]:
    """Let lm-eval score a subject; keep its files where there is a place for them."""
    from diffxfer.evaluation.harness import score
    from diffxfer.evaluation.native import read_scores

    tracker = None if run.store is None else run.store.tracker()
    with _folder_of(subject, run) as folder:
        results = score(folder, str(subject), run.tasks, names, run.settings, tracker)
    fresh = read_scores(results, results["samples"])
    entries = {name: (*run.tasks.groups[name], *run.tasks.leaves[name]) for name in names}
    if run.store is not None and tracker is not None:
        scored = {
            name: {
                "key": keys[name],
                "tasks": run.tasks.leaves[name],
                "groups": run.tasks.groups[name],
            }
            for name in names
        }
        run.store.save(subject.label, subject.alpha, results, scored, tracker)
    return {name: [found for found in fresh if found.task in entries[name]] for name in names}


def _keys(subject: Subject, run: _Run, tell: Callable[[str], None]) -> dict[str, str | None]:
    """By task, what tells this score from any other; None where that is not known."""
    names = run.tasks.names
    if run.store is None or not run.settings.reads_folders:
        return dict.fromkeys(names)
    made_of = [Path(subject.label), *([] if subject.diff is None else [subject.diff])]
    for folder in made_of:
        if folder not in run.contents:
            tell(f"reading {folder}, to know it again")
            run.contents[folder] = content_key(folder)
    versions = [version(package) for package in ("lm-eval", "transformers")]
    made_by = [] if subject.diff is None else [version("diffxfer"), subject.alpha]
    shared = [
        [run.contents[folder] for folder in made_of],
        [*versions, *made_by],
        run.settings.that_shapes_scores(),
    ]
    return {name: _digest([*shared, run.tasks.fingerprints[name]]) for name in names}


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


@contextmanager
def _folder_of(subject: Subject, run: _Run) -> Iterator[str]:
    """The folder of a model; of a graft, one that is made now and gone afterwards."""
    if subject.diff is None:
        yield subject.label
        return
    with scratch_folder(None if run.store is None else run.store.folder) as scratch:
        alpha = subject.alpha or 0.0
        out = scratch / f"{Path(subject.label).name or 'graft'}+{alpha:g}"
        apply_diff(subject.diff, subject.label, out, alpha=alpha)
        yield str(out)
