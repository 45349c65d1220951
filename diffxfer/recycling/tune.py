"""Further training of a model: plain, or with a teacher whose knowledge is distilled into it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.partial import find_unfinished
from diffxfer.checkpoints.place import refuse_small_disk, refuse_unsafe_output
from diffxfer.diffs.extract import every_input
from diffxfer.diffs.source import open_roles, source_entry
from diffxfer.errors import NonFiniteError, TrainingError, UnfinishedError
from diffxfer.recycling.teacher import check_teacher, context_length
from diffxfer.recycling.trained_model import read_log, write_tuned
from diffxfer.recycling.training_data import is_file, read_rows
from diffxfer.recycling.training_options import (
    DISTILL_WEIGHT,
    TEMPERATURE,
    TuneOptions,
    check_options,
    training_bytes,
)
from diffxfer.recycling.training_report import TuneReport
from diffxfer.recycling.training_workspace import WorkFolder, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.trainer import Cut
    from diffxfer.recycling.training_data import Rows


def tune(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    steps: int,
    learning_rate: float = 2e-5,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    max_length: int = 1024,
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

    A run that is cut off leaves a folder `.OUT.tuning` beside `out`; the same call continues it.

    Args:
        model: the checkpoint to begin with, such as a graft: a folder, or a model on the Hub,
            ``"org/name"`` or ``"org/name@revision"``.
        data: a ``.jsonl``, ``.json`` or ``.parquet`` file, or a data set's id on the Hub; its rows
            have `messages`, `prompt` and `completion`, or `text`.
        out: the folder to make.
        steps: how many times the optimizer steps.
        learning_rate: of AdamW at the first step; it falls linearly to zero.
        batch_size: rows a process takes at a time.
        gradient_accumulation: batches a step.
        gradient_checkpointing: save memory by computing activations twice.
        max_length: tokens of a row; what is longer is cut.
        seed: of the rows' order and of dropout.
        teacher: a model of the same vocabulary to learn from too, likewise: the outdated
            fine-tuned one.
        distill_weight: how much the teacher counts against the rows, from 0 to 1.
        temperature: what logits are divided by to compare them with the teacher's.
        hidden_weight: how much the difference of hidden states counts beside.
        save_every: steps from one state to continue from to the next; None for a tenth of all, 50
            at least.
        restart: begin anew, whatever a run that was cut off has left.
        device: ``"cpu"``, ``"cuda"``, or None for a GPU where there is one.
        overwrite: replace a folder of ours at `out`.
        progress: called with the steps done, the steps in all and the last step's loss.
        moved: called with the bytes done and the bytes in all of a download from the Hub.
        opened: called with the folder of states, beside `out`, once it may be written to.

    Returns:
        What was done; under `accelerate launch`, in every process.

    Raises:
        DiffxferError: for every known failure; nothing is at `out` then.

    Example:
        >>> tune("llama-3.1-grafted", "train.jsonl", "tuned", steps=200)  # doctest: +SKIP
    """
    began = time.perf_counter()
    options = TuneOptions(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        max_length=max_length,
        seed=seed,
        distill_weight=distill_weight,
        temperature=temperature,
        hidden_weight=hidden_weight,
        save_every=save_every,
    )
    check_options(options, distilled=teacher is not None, device=device)
    require_trl()
    job = _open(model, str(data), Path(out), teacher, options, overwrite=overwrite, moved=moved)
    work = WorkFolder(job.out)
    try:
        return _run(job, work, device, restart, _Listeners(progress, opened), began)
    finally:
        work.close()


@dataclass(frozen=True, slots=True)
class _Listeners:
    """What is called on the way; see `tune`."""

    progress: Callable[[int, int, float], None] | None
    opened: Callable[[Path], None] | None


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything that is known before torch is imported."""

    model: Checkpoint
    teacher: Checkpoint | None
    rows: Rows
    options: TuneOptions
    out: Path
    overwrite: bool

    @property
    def length(self) -> int:
        """The most tokens of a row: no more than the model can read at once."""
        context = context_length(self.model.config)
        return min(self.options.max_length, context or self.options.max_length)


def require_trl() -> None:
    """Refuse to train where TRL is not installed.

    Raises:
        TrainingError: if it is not.
    """
    if find_spec("trl") is None:
        raise TrainingError(
            "",
            "tuning needs TRL, which is not installed",
            "pip install 'diffxfer[tune]', or pipx inject diffxfer trl",
        )


def _open(
    model: Path | str,
    data: str,
    out: Path,
    teacher: Path | str | None,
    options: TuneOptions,
    *,
    overwrite: bool,
    moved: Callable[[int, int], None] | None,
) -> _Job:
    named = {"starting": model, **({} if teacher is None else {"teacher": teacher})}
    opened = open_roles(named)
    inputs = every_input(*opened.values())
    if is_file(data):
        inputs.append(Path(data))
    refuse_unsafe_output(out, inputs, overwrite=overwrite)
    if "teacher" in opened:
        hidden = options.hidden_weight > 0
        check_teacher(opened["starting"], opened["teacher"], hidden=hidden)
    rows = read_rows(data)
    fetch_shards((shard for each in opened.values() for shard in each.weights.shards), moved)
    return _Job(opened["starting"], opened.get("teacher"), rows, options, out, overwrite)


def _run(
    job: _Job,
    work: WorkFolder,
    device: str | None,
    restart: bool,
    listeners: _Listeners,
    began: float,
) -> TuneReport:
    """Train, in as many processes as there are, and write the result in one."""
    from diffxfer.recycling.distributed import first_does
    from diffxfer.recycling.trainer import train
    from diffxfer.recycling.trainer_config import make_config, quiet_libraries

    with quiet_libraries():
        config = make_config(job.options, work.path, device)
        processes = config.world_size

        def begin() -> tuple[int, Path] | None:
            work.open(_identity(job, processes, config.device.type), restart=restart)
            newest = work.newest()
            if newest is None:
                if not restart:
                    _refuse_unfinished(job.out)
                refuse_small_disk(job.out, _bytes_needed(job))
            return newest

        newest = first_does(config, begin)
        if listeners.opened is not None:
            listeners.opened(work.path)
        cut = None
        if newest is None or newest[0] < job.options.steps:
            cut = train(
                *(job.model, job.teacher, job.rows, job.options, config, work),
                length=job.length,
                progress=listeners.progress if config.process_index == 0 else None,
            )

        def end() -> TuneReport:
            report = _write(job, work, processes, cut, newest[0] if newest else 0, began)
            work.remove()
            return report

        return first_does(config, end)


def _refuse_unfinished(out: Path) -> None:
    """Tell before the training what would be in the way after it."""
    kept = find_unfinished(out)
    if kept:
        problem = f"an unfinished run of another command is there: {kept}"
        remedy = "give that run's command to continue it, or --restart to discard it"
        raise UnfinishedError(out, problem, remedy)


def _identity(job: _Job, processes: int, device: str) -> dict[str, Any]:
    """What makes two runs the same, as values that JSON has."""
    return {
        "model": describe(job.model),
        "teacher": describe(job.teacher) if job.teacher else None,
        "data": job.rows.digest,
        **job.options.command(distilled=job.teacher is not None),
        "number of processes": processes,
        "device": device,
    }


def _bytes_needed(job: _Job) -> int:
    """The disk that training takes at most."""
    result = sum(shard.size for shard in job.model.weights.shards)
    options = job.options
    return training_bytes(result, job.model.elements, options.steps, options.save_every)


def _write(
    job: _Job, work: WorkFolder, processes: int, cut: Cut | None, begun: int, began: float
) -> TuneReport:
    newest = work.newest()
    assert newest is not None
    entries = {"model": source_entry(job.model.weights)}
    if job.teacher is not None:
        entries["teacher"] = source_entry(job.teacher.weights)
    command: dict[str, str | float] = {
        "data": job.rows.name,
        "data_xxh3": job.rows.digest,
        "rows": len(job.rows),
        **job.options.command(distilled=job.teacher is not None),
        **({"processes": processes} if processes > 1 else {}),
    }
    step, state = newest
    try:
        written = write_tuned(
            job.model, state, job.out, command=command, sources=entries, overwrite=job.overwrite
        )
    except NonFiniteError as exc:
        exc.remedy = "train anew with a smaller --learning-rate and --restart"
        raise
    return TuneReport(
        command="tune",
        output=written.output,
        steps=step,
        continued_from=begun,
        rows=len(job.rows),
        log=read_log(state),
        tensors=written.tensors,
        parameters=written.parameters,
        bytes_to_write=written.bytes_to_write,
        elapsed_s=round(time.perf_counter() - began, 3),
        warnings=(*_warnings(cut), *written.warnings),
    )


def _warnings(cut: Cut | None) -> list[str]:
    if cut is None or not (cut.shortened or cut.dropped):
        return []
    found = []
    if cut.shortened:
        found.append(f"rows cut, being longer than {cut.length} tokens: {cut.shortened:,}")
    if cut.dropped:
        found.append(f"rows left out, having nothing to predict: {cut.dropped:,}")
    return found
