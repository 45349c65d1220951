"""Further training of a model, optionally with distillation from a teacher."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import refuse_small_disk
from diffxfer.checkpoints.partial import find_unfinished
from diffxfer.diffs.delta.from_checkpoints import source_entry
from diffxfer.errors import NonFiniteError, TrainingError, UnfinishedError, listed
from diffxfer.recycling.trained_model import read_log, write_trained_model
from diffxfer.recycling.training_job import prepare_job
from diffxfer.recycling.training_options import (
    DISTILL_WEIGHT,
    TEMPERATURE,
    WARMUP,
    TuneOptions,
    check_options,
)
from diffxfer.recycling.training_report import TuneReport
from diffxfer.recycling.training_workspace import TrainingWorkspace

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.recycling.training_job import TrainingJob
    from diffxfer.recycling.training_report import Truncation


def tune(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    objective: str | None = None,
    steps: int,
    learning_rate: float = 2e-5,
    warmup: float = WARMUP,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    max_length: int = 1024,
    end_token: bool = True,
    seed: int = 0,
    teacher: Path | str | None = None,
    distill_weight: float = DISTILL_WEIGHT,
    temperature: float = TEMPERATURE,
    hidden_weight: float = 0.0,
    save_every: int | None = None,
    restart: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
    opened: Callable[[Path], None] | None = None,
) -> TuneReport:
    """Train all parameters of a model further on rows of text.

    An interrupted run leaves the folder `.OUT.tuning` beside `out`; the same call resumes it.

    Args:
        model: the checkpoint to train, such as a graft: a folder, or a model on the Hub,
            ``"org/name"`` or ``"org/name@revision"``.
        data: a ``.jsonl``, ``.json`` or ``.parquet`` file, or the id of a dataset on the Hub; its
            rows have `messages`, `prompt` and `completion`, or `text`; for a classifier `text` and
            `label`, or `text`, `text_pair` and `label`.
        out: the folder to write.
        objective: what to predict: ``"causal"``, the next token; ``"classification"``, the label of
            a row; or ``"mlm"``, masked tokens. None: what the model predicts, or the label if the
            rows of a masked language model or a bare encoder have one; the head is then new.
        steps: the number of optimizer steps.
        learning_rate: of AdamW after the warm-up; it decays linearly to zero.
        warmup: the number of steps in which the learning rate rises linearly from zero; below 1, a
            share of all steps, rounded down.
        batch_size: rows per process and batch.
        gradient_accumulation: batches per step.
        gradient_checkpointing: save memory by recomputing activations.
        max_length: the maximum number of tokens of a row; longer rows are truncated.
        end_token: end each text and each completion with the end-of-text token, and count it in
            the loss; messages end as the chat template says.
        seed: of the order of the rows, of dropout, of masks and of a new head.
        teacher: a model of the same vocabulary, and for a classifier of the same labels, to learn
            from as well, such as the outdated fine-tuned model; a folder or a model on the Hub.
        distill_weight: the weight of the teacher against the rows, from 0 to 1.
        temperature: the divisor of the logits when they are compared with the teacher's.
        hidden_weight: the weight of the difference of the hidden states.
        save_every: steps between resumable states; None for a tenth of all steps, but at least 50.
        restart: start over, and discard the state of an interrupted run.
        device: ``"cpu"``, ``"cuda"``, or None for a GPU if there is one.
        overwrite: replace a folder at `out` that diffxfer wrote.
        progress: called with the number of steps done, the total, and the loss of the last step.
        moved: called with the bytes done and the total of a download from the Hub.
        opened: called with the folder of saved states, when it can be written to.

    Returns:
        The report; under `accelerate launch`, in every process.

    Raises:
        DiffxferError: for every known failure; then there is nothing at `out`.

    Example:
        >>> tune("llama-3.1-grafted", "train.jsonl", "tuned", steps=200)  # doctest: +SKIP
    """
    began = time.perf_counter()
    options = TuneOptions(
        objective=objective,
        steps=steps,
        learning_rate=learning_rate,
        warmup=warmup,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        max_length=max_length,
        end_token=end_token,
        seed=seed,
        distill_weight=distill_weight,
        temperature=temperature,
        hidden_weight=hidden_weight,
        save_every=save_every,
    )
    check_options(options, distilled=teacher is not None, device=device)
    require_trl()
    job = prepare_job(
        model, str(data), Path(out), teacher, options, overwrite=overwrite, moved=moved
    )
    workspace = TrainingWorkspace(job.out)
    try:
        return _train_and_write(
            job, workspace, device, restart, _Callbacks(progress, opened), began
        )
    finally:
        workspace.close()


@dataclass(frozen=True, slots=True)
class _Callbacks:
    """The callbacks of `tune` that are called during training."""

    progress: Callable[[int, int, float], None] | None
    opened: Callable[[Path], None] | None


def require_trl() -> None:
    """Check that TRL is installed.

    Raises:
        TrainingError: if it is not.
    """
    if find_spec("trl") is None:
        raise TrainingError(
            "",
            "tuning needs TRL, which is not installed",
            "pip install 'diffxfer[tune]', or pipx inject diffxfer trl",
        )


def _train_and_write(
    job: TrainingJob,
    workspace: TrainingWorkspace,
    device: str | None,
    restart: bool,
    callbacks: _Callbacks,
    began: float,
) -> TuneReport:
    """Train in all processes, and write the result in the first one."""
    from diffxfer.recycling.distributed import run_in_first_process
    from diffxfer.recycling.trainer import train
    from diffxfer.recycling.trainer_config import make_trainer_config, silence_libraries

    with silence_libraries():
        config = make_trainer_config(job.options, workspace.path, device)
        processes = config.world_size

        def begin() -> tuple[int, Path] | None:
            workspace.open(job.run_parameters(processes, config.device.type), restart=restart)
            newest = workspace.latest_state()
            if newest is None:
                if not restart:
                    _refuse_unfinished(job.out)
                refuse_small_disk(job.out, job.bytes_needed)
            return newest

        newest = run_in_first_process(config, begin)
        if callbacks.opened is not None:
            callbacks.opened(workspace.path)
        truncation = None
        if newest is None or newest[0] < job.options.steps:
            shown = callbacks.progress if config.process_index == 0 else None
            truncation = train(job, config, workspace, progress=shown)

        def end() -> TuneReport:
            report = _write_result(
                job, workspace, processes, truncation, newest[0] if newest else 0, began
            )
            workspace.remove()
            return report

        return run_in_first_process(config, end)


def _refuse_unfinished(out: Path) -> None:
    """Refuse, before training, an unfinished output that would block writing the result."""
    kept = find_unfinished(out)
    if kept:
        problem = f"another command left an unfinished output there: {kept}"
        remedy = "repeat that command to resume it, or give --restart to discard it"
        raise UnfinishedError(out, problem, remedy)


def _write_result(
    job: TrainingJob,
    workspace: TrainingWorkspace,
    processes: int,
    truncation: Truncation | None,
    begun: int,
    began: float,
) -> TuneReport:
    newest = workspace.latest_state()
    assert newest is not None
    sources = {"model": source_entry(job.model.weights)}
    if job.teacher is not None:
        sources["teacher"] = source_entry(job.teacher.weights)
    command: dict[str, str | float] = {
        "data": job.rows.name,
        "data_xxh3": job.rows.digest,
        "rows": len(job.rows),
        **job.recorded_options,
        **({"processes": processes} if processes > 1 else {}),
    }
    step, state = newest
    try:
        written = write_trained_model(
            *(job.model, state, job.out),
            labels=job.labels,
            command=command,
            sources=sources,
            overwrite=job.overwrite,
        )
    except NonFiniteError as exc:
        exc.remedy = "train again with --restart and a smaller --learning-rate"
        raise
    return TuneReport(
        command="tune",
        objective=str(job.options.objective),
        output=written.output,
        steps=step,
        continued_from=begun,
        rows=len(job.rows),
        log=read_log(state),
        tensors=written.tensors,
        parameters=written.parameters,
        bytes_to_write=written.bytes_to_write,
        elapsed_s=round(time.perf_counter() - began, 3),
        warnings=(*(truncation.warnings() if truncation else ()), *written.warnings),
        notes=tuple(_notes(job)),
    )


def _notes(job: TrainingJob) -> list[str]:
    if job.labels is None or not job.labels.new:
        return []
    names = listed(job.labels.names)
    seed = job.options.seed
    return [f"the classification head is new, made from seed {seed}; its labels are {names}"]
