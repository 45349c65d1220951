"""From a trained state on disk to a checkpoint like the one that training began with.

The trained state is what transformers' `save_pretrained` wrote, in float32 and under the names that
belong on disk. The output has the first model's names, dtypes, shards and companions.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import list_companions, read_object
from diffxfer.checkpoints.header import FLOATS
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.job import Job, RunOptions, do, nothing_more
from diffxfer.diffs.matching.match import Fate
from diffxfer.diffs.matching.names import pair_names
from diffxfer.diffs.matching.ties import HeadState, find_head
from diffxfer.errors import TrainingError
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.diffs.report import Report

LOG_NAME = "training_log.jsonl"
"""One line a step, in the output: what a report can plot."""

_LOGGED = ("step", "loss", "ce", "kl", "hidden", "learning_rate", "grad_norm")
_NOT_LOADED = "transformers does not load it"


def pair_trained_tensors(model: Checkpoint, state: Path) -> dict[str, TensorSpec | None]:
    """Pair a saved state with the model that it began as.

    Args:
        model: the model.
        state: what `save_pretrained` wrote.

    Returns:
        The trained tensor of each of the model's, by the model's names; None for one that
        transformers does not load, such as a buffer that it computes or a head for a task that it
        does not know.

    Raises:
        TrainingError: if the state is not that model's, tensor by tensor.
    """
    trained = open_weights(state).tensors
    pairs = pair_names(model.tensors, trained, ("the model", "its trained state"))
    head = find_head(model.tensors, model.config)
    if head.state is HeadState.TIED and head.name is not None and head.name not in pairs:
        pairs[head.name] = pairs.get(head.embedding or "", "")
    homeless = sorted(trained.keys() - pairs.values())
    if homeless:
        problem = f"transformers saves {homeless[0]}, which the model does not have on disk"
        remedy = f"save the model with save_pretrained first ({len(homeless)} such tensors)"
        raise TrainingError(model.folder, problem, remedy)
    found = {name: trained.get(pairs.get(name, "")) for name in model.tensors}
    for name, spec in found.items():
        if spec is not None and spec.shape != model.tensors[name].shape:
            problem = f"{name} is {model.tensors[name].shape} on disk and {spec.shape} in training"
            raise TrainingError(model.folder, problem, "save the model with save_pretrained first")
    return found


def read_log(state: Path) -> tuple[dict[str, float], ...]:
    """The training log in a Trainer's checkpoint, one entry a step.

    Args:
        state: the checkpoint.
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
        model: what training began with.
        state: the Trainer's last checkpoint.
        out: the folder to make.
        command: the options, for manifest and card.
        sources: the inputs by role.
        overwrite: replace a folder of ours at `out`.

    Returns:
        What was written.

    Raises:
        DiffxferError: if that fails; nothing is at `out` then.
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
    # What an earlier write of the same state left is made again in the time of a copy.
    return do(job, RunOptions(overwrite=overwrite, restart=True))


def _task(spec: TensorSpec, source: TensorSpec) -> TensorTask:
    """Write a tensor's values in the dtype, and to the shard, of the model's own."""
    return TensorTask(
        name=spec.name,
        operation=Operation.COPY,
        inputs=(source,),
        dtype=spec.dtype,
        shape=spec.shape,
        runs=whole(RunKind.COPY, 1),
        shard=spec.shard.path.name,
    )
