"""Writing the trained model in the layout of the model that training began with.

The trained state was written by `save_pretrained` of transformers, in float32. The output has the
tensor names, dtypes, shards and companions of the original model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import list_companions, read_bytes, read_object
from diffxfer.checkpoints.files import same_values
from diffxfer.checkpoints.json_edit import edit_json
from diffxfer.checkpoints.reader import open_weights
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.jobs.job import Job, RunOptions, do, nothing_more
from diffxfer.diffs.matching.match import Fate
from diffxfer.diffs.matching.names import is_head_name, pair_names
from diffxfer.diffs.matching.parts import pair_tensors
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
    from diffxfer.recycling.labels import Labels

LOG_NAME = "training_log.jsonl"
"""The file in the output that has one JSON line per training step."""

CONFIG = "config.json"

_LOGGED = ("step", "loss", "ce", "kl", "hidden", "learning_rate", "grad_norm")
_NOT_LOADED = "transformers does not load it"
_DECODER = re.compile(r"decoder\.(?:weight|bias)|.*position_ids")
"""The decoder of ModernBERT, which is outside its head, and stored position numbers."""
_OTHER_HEAD = "it belongs to another head"
_TIED_TO = {
    "weight": ("word_embeddings.weight", "embed_tokens.weight", "tok_embeddings.weight"),
    "bias": ("lm_head.bias", "cls.predictions.bias"),
}
"""The endings of the tensors that a decoder in the head of a masked language model is tied to."""


def is_unused(name: str) -> bool:
    """Whether a tensor may have no part in an encoder's training.

    It is in a head of another task, or one of the position numbers that older releases stored.

    Args:
        name: its name on disk.
    """
    return is_head_name(name) or _DECODER.fullmatch(name) is not None


def pair_trained_tensors(
    model: Checkpoint, state: Path, *, new_head: bool = False
) -> dict[str, StoredTensor | None]:
    """Pair the tensors of a model with those of its trained state.

    Args:
        model: the model that training began with.
        state: the folder that `save_pretrained` wrote.
        new_head: whether the state has a classification head that the model lacks.

    Returns:
        The trained tensor for each tensor name of the model; None for a tensor that transformers
        does not load, such as a buffer that it computes, or the head of an unknown task.

    Raises:
        TrainingError: if the state has other tensors or shapes than the model.
    """
    trained = open_weights(state).tensors
    pairs = _pair(model, trained, new_head=new_head)
    unpaired = sorted(trained.keys() - pairs.values())
    unpaired = [name for name in unpaired if not (new_head and is_head_name(name))]
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


def _pair(
    model: Checkpoint, trained: Mapping[str, StoredTensor], *, new_head: bool
) -> dict[str, str]:
    roles = ("the model", "its trained state")
    if new_head:  # a bare encoder's names lack the prefix that they have in a classifier
        shapes = [
            {name: spec.shape for name, spec in each.items()} for each in (model.tensors, trained)
        ]
        return pair_tensors(shapes[0], shapes[1], roles)
    pairs = pair_names(model.tensors, trained, roles)
    head = find_head(model.tensors, model.config)
    if head.state is HeadState.TIED and head.name is not None and head.name not in pairs:
        pairs[head.name] = pairs.get(head.embedding or "", "")
    return pairs | _decoder_copies(model.tensors, pairs)


def _decoder_copies(
    tensors: Mapping[str, StoredTensor], pairs: Mapping[str, str]
) -> dict[str, str]:
    """Pair what older releases stored twice: a masked language model's decoder and its bias."""
    found = {}
    for name, spec in tensors.items():
        leaf = name.rpartition(".")[2]
        if name in pairs or not name.endswith(("decoder.weight", "decoder.bias")):
            continue
        for other, original in pairs.items():
            same = other.endswith(_TIED_TO[leaf]) and tensors[other].shape == spec.shape
            if same and same_values(spec, tensors[other]):
                found[name] = original
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
    labels: Labels | None,
    command: Mapping[str, str | float],
    sources: Mapping[str, SourceEntry],
    overwrite: bool,
) -> Report:
    """Write the trained model.

    Args:
        model: the model that training began with.
        state: the last state of the Trainer.
        out: the folder to write.
        labels: those of a classifier.
        command: the options, for the manifest and the card.
        sources: the inputs by role.
        overwrite: replace a folder at `out` that diffxfer wrote.

    Returns:
        What was written.

    Raises:
        DiffxferError: if writing fails; then there is nothing at `out`.
    """
    new_head = labels is not None and labels.new
    found = pair_trained_tensors(model, state, new_head=new_head)
    tasks, fates = _with_new_head(model, state, found) if new_head else _as_before(model, found)
    kept = sorted(fate.name for fate in fates if fate.why == _NOT_LOADED)
    companions = list_companions(model.folder)
    files: dict[str, bytes | Path] = {name: model.folder / name for name in companions.names}
    files[LOG_NAME] = "".join(f"{json.dumps(entry)}\n" for entry in read_log(state)).encode()
    if labels is not None and labels.new:
        files[CONFIG] = _labelled_config(model.folder, state, labels)
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


def _as_before(
    model: Checkpoint, found: Mapping[str, StoredTensor | None]
) -> tuple[list[TensorTask], list[Fate]]:
    """Write the tensors that the model has."""
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
    return tasks, fates


def _with_new_head(
    model: Checkpoint, state: Path, found: Mapping[str, StoredTensor | None]
) -> tuple[list[TensorTask], list[Fate]]:
    """Write the body under the names that transformers gives it in a classifier, and the head.

    The head goes to the last shard, in the dtype of most of the body.
    """
    tasks: list[TensorTask] = []
    fates: list[Fate] = []
    old = {spec.name: name for name, spec in found.items() if spec is not None}
    for name, spec in model.tensors.items():
        trained = found[name]
        if trained is None:
            fates.append(Fate("left out", name, spec.elements, _OTHER_HEAD))
        else:
            source = trained if spec.dtype in FLOATS else spec
            tasks.append(replace(_task(spec, source), name=trained.name))
            fates.append(Fate("tuned", trained.name, spec.elements))
    dtype = Counter(task.dtype for task in tasks if task.dtype in FLOATS).most_common(1)[0][0]
    last = max(task.shard for task in tasks if task.shard is not None)
    for name, spec in open_weights(state).tensors.items():
        if name not in old:
            tasks.append(replace(_task(spec, spec), dtype=dtype, shard=last))
            fates.append(Fate("tuned", name, spec.elements, "new"))
    return tasks, fates


def _labelled_config(folder: Path, state: Path, labels: Labels) -> bytes:
    """The model's config.json, as that of a classifier with these labels."""
    raw = read_bytes(folder / CONFIG)
    architectures = read_object(state / CONFIG)["architectures"]
    return edit_json(raw, {"architectures": architectures, **labels.config})


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
