"""Writing the trained model in the layout of the model that training began with.

The trained state was written by `save_pretrained` of transformers, in float32. The output has the
tensor names, dtypes, shards and companions of the original model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import list_companions, read_object
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.jobs.job import Job, RunOptions, do, nothing_more
from diffxfer.diffs.matching.match import Fate
from diffxfer.diffs.matching.names import pair_names
from diffxfer.diffs.matching.ties import HeadState, find_head
from diffxfer.errors import TrainingError
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.diffs.jobs.report import Report

LOG_NAME = "training_log.jsonl"
"""The file in the output that has one JSON line per training step."""

_LOGGED = ("step", "loss", "ce", "kl", "hidden", "learning_rate", "grad_norm")
_NOT_LOADED = "transformers does not load it"


def pair_trained_tensors(model: Checkpoint, state: Path) -> dict[str, StoredTensor | None]:
    """Pair the tensors of a model with those of its trained state.

    Args:
        model: the model that training began with.
        state: the folder that `save_pretrained` wrote.

    Returns:
        The trained tensor for each tensor name of the model; None for a tensor that transformers
        does not load, such as a buffer that it computes, or the head of an unknown task.

    Raises:
        TrainingError: if the state has other tensors or shapes than the model.
    """
    trained = open_weights(state).tensors
    pairs = pair_names(model.tensors, trained, ("the model", "its trained state"))
    head = find_head(model.tensors, model.config)
    if head.state is HeadState.TIED and head.name is not None and head.name not in pairs:
        pairs[head.name] = pairs.get(head.embedding or "", "")
    unpaired = sorted(trained.keys() - pairs.values())
    if unpaired:
        problem = f"transformers saves {unpaired[0]}, which the model does not have on disk"
        remedy = f"save the model with save_pretrained first ({len(unpaired)} such tensors)"
        raise TrainingError(model.folder, problem, remedy)
    found = {name: trained.get(pairs.get(name, "")) for name in model.tensors}
    for name, spec in found.items():
        if spec is not None and spec.shape != model.tensors[name].shape:
            problem = f"{name} is {model.tensors[name].shape} on disk and {spec.shape} in training"
            raise TrainingError(model.folder, problem, "save the model with save_pretrained first")
    return found


def read_log(state: Path) -> tuple[dict[str, float], ...]:
    """Read the training log, one entry per step, from a state of the Trainer.

    Args:
        state: the folder of the state.
    """
    history: list[dict[str, Any]] = read_object(state / "trainer_state.json")["log_history"]
    return tuple(
        {name: entry[name] for name in _LOGGED if name in entry}
        for entry in history
        if "loss" in entry
    )


def write_trained_model(
    model: Checkpoint,
    state: Path,
    out: Path,
    *,
    command: Mapping[str, str | float],
    sources: Mapping[str, SourceEntry],
    overwrite: bool,
) -> Report:
    """Write the trained model.

    Args:
        model: the model that training began with.
        state: the last state of the Trainer.
        out: the folder to write.
        command: the options, for the manifest and the card.
        sources: the inputs by role.
        overwrite: replace a folder at `out` that diffxfer wrote.

    Returns:
        What was written.

    Raises:
        DiffxferError: if writing fails; then there is nothing at `out`.
    """
    found = pair_trained_tensors(model, state)
    tasks, fates = [], []
    for name, spec in model.tensors.items():
        trained = found[name]
        tuned = trained is not None and spec.dtype in FLOATS
        tasks.append(_task(spec, trained if trained is not None and tuned else spec))
        fates.append(
            Fate("tuned", name, spec.elements)
            if tuned
            else Fate("copied", name, spec.elements, _NOT_LOADED if trained is None else "integers")
        )
    kept = sorted(name for name, trained in found.items() if trained is None)
    companions = list_companions(model.folder)
    files: dict[str, bytes | Path] = {name: model.folder / name for name in companions.names}
    files[LOG_NAME] = "".join(f"{json.dumps(entry)}\n" for entry in read_log(state)).encode()
    job = Job(
        verb="tune",
        out=out,
        tasks=tasks,
        inputs=(*open_weights(state).shards, *model.weights.shards),
        indexed=model.weights.indexed,
        files=files,
        command=dict(command),
        sources=sources,
        fates=fates,
        problems=[],
        finish=nothing_more,
        left_out=tuple(name for name in companions.left_out if name != LOG_NAME),
        warnings=[f"kept as it was, since {_NOT_LOADED}: {name}" for name in kept],
    )
    # Restarting an interrupted write takes no longer than a copy.
    return do(job, RunOptions(overwrite=overwrite, restart=True))


def _task(spec: StoredTensor, source: StoredTensor) -> TensorTask:
    """Write the values of `source` with the name, dtype and shard of `spec`."""
    return TensorTask(
        name=spec.name,
        operation=Operation.COPY,
        inputs=(source,),
        dtype=spec.dtype,
        shape=spec.shape,
        runs=whole(RunKind.COPY, 1),
        shard=spec.shard.path.name,
    )
