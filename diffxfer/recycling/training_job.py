"""The checked inputs and options of a training run, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.checkpoints.output_place import refuse_unsafe_output
from diffxfer.diffs.delta.from_checkpoints import open_roles
from diffxfer.diffs.extraction.extract import every_input
from diffxfer.errors import OptionError
from diffxfer.recycling.labels import prepare_labels
from diffxfer.recycling.objectives import (
    CAUSAL,
    CLASSIFICATION,
    check_objective,
    check_teacher_kind,
    choose_objective,
    rows_accepted,
)
from diffxfer.recycling.teacher import check_teacher, context_length
from diffxfer.recycling.training_data import is_local_file, read_rows
from diffxfer.recycling.training_options import peak_training_bytes
from diffxfer.recycling.training_workspace import quick_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.labels import Labels
    from diffxfer.recycling.training_data import TrainingRows
    from diffxfer.recycling.training_options import TuneOptions


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What a run trains, and how.

    Attributes:
        model: the model to train.
        teacher: the model to learn from, in addition to the rows.
        rows: the training rows.
        labels: those of a classifier, and of the rows.
        options: the options, with the objective that was chosen.
        out: the folder to write.
        overwrite: replace a folder at `out` that diffxfer wrote.
    """

    model: Checkpoint
    teacher: Checkpoint | None
    rows: TrainingRows
    labels: Labels | None
    options: TuneOptions
    out: Path
    overwrite: bool

    @property
    def length(self) -> int:
        """The maximum number of tokens of a row, limited by the context length of each model."""
        readers = (self.model, *([self.teacher] if self.teacher else []))
        contexts = [context_length(each.config) for each in readers]
        return min(self.options.max_length, *filter(None, contexts))

    @property
    def recorded_options(self) -> dict[str, str | float]:
        """The options that the manifest records."""
        return self.options.recorded(distilled=self.teacher is not None)

    @property
    def bytes_needed(self) -> int:
        """The maximum disk space that training uses."""
        result = sum(shard.size for shard in self.model.weights.shards)
        steps, save_every = self.options.steps, self.options.save_every
        return peak_training_bytes(result, self.model.elements, steps, save_every)

    def run_parameters(self, processes: int, device: str) -> dict[str, Any]:
        """The inputs and options that must be equal for a run to be resumed, as JSON values.

        Args:
            processes: the number of processes.
            device: the type of the device.
        """
        return {
            "model": quick_fingerprint(self.model),
            "teacher": quick_fingerprint(self.teacher) if self.teacher else None,
            "data": self.rows.digest,
            **self.recorded_options,
            "number of processes": processes,
            "device": device,
        }


def prepare_job(
    model: Path | str,
    data: str,
    out: Path,
    teacher: Path | str | None,
    options: TuneOptions,
    *,
    overwrite: bool,
    moved: Callable[[int, int], None] | None,
) -> TrainingJob:
    """Open, check and download the inputs of a run.

    Args:
        model: the model to train.
        data: a file of training rows, or the id of a dataset on the Hub.
        out: the folder to write.
        teacher: the model to learn from, in addition to the rows.
        options: the options of the run.
        overwrite: replace a folder at `out` that diffxfer wrote.
        moved: called with the bytes done and the total of a download from the Hub.

    Raises:
        DiffxferError: if an input cannot be used.
    """
    named = {"starting": model, **({} if teacher is None else {"teacher": teacher})}
    opened = open_roles(named)
    inputs = every_input(*opened.values())
    if is_local_file(data):
        inputs.append(Path(data))
    refuse_unsafe_output(out, inputs, overwrite=overwrite)
    student, guide = opened["starting"], opened.get("teacher")
    check_objective(student, options.objective)
    rows = read_rows(data, rows_accepted(student, options.objective))
    objective = choose_objective(student, rows, options.objective)
    if guide is not None:
        check_teacher_kind(guide, objective)
        check_teacher(
            student,
            guide,
            hidden=options.hidden_weight > 0,
            words=objective != CLASSIFICATION,
        )
    _check_end_token(rows, objective, end_token=options.end_token)
    labels = prepare_labels(student, guide, rows) if objective == CLASSIFICATION else None
    fetch_shards((shard for each in opened.values() for shard in each.weights.shards), moved)
    options = replace(options, objective=objective)
    return TrainingJob(student, guide, rows, labels, options, out, overwrite)


def _check_end_token(rows: TrainingRows, objective: str, *, end_token: bool) -> None:
    if end_token:
        return
    if objective != CAUSAL:
        problem = f"has no effect on --objective {objective}"
        raise OptionError("--no-end-token", problem, "omit it")
    if rows.chat:
        problem = f"has no effect on rows of {' and '.join(rows.columns)}, which have messages"
        raise OptionError("--no-end-token", problem, "omit it, and change the chat template")
