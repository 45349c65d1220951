"""A graft in the encoding of its target: tasks that write codes and scales, and their errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.encodings.requantize import requantize, typical_error
from diffxfer.checkpoints.stored import TensorSpec
from diffxfer.diffs.grafting.output_names import names_of_parts, stored_names
from diffxfer.diffs.grafting.tasks import check_task, checks_itself
from diffxfer.diffs.jobs.report import StoredError
from diffxfer.errors import OptionError
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, whole
from diffxfer.streaming.statistics import norm
from diffxfer.streaming.task_values import TaskValues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from diffxfer.checkpoints.encodings.requantize import Requantized
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.grafting.pairing import Output
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.streaming.statistics import TensorResult

_ERROR = "requantised: "
SWALLOWED = 0.5
"""Warn where the error is this share of ‖α·Δ‖ or more."""
_OPTION = "--requantize"


def requantized_tasks(tasks: Sequence[TensorTask], output: Output) -> list[TensorTask]:
    """Replace the tasks of encoded tensors by those that write their parts.

    Args:
        tasks: the tasks of a whole graft, or none.
        output: the matching.

    Returns:
        The tasks, those that measure errors first.

    Raises:
        OptionError: if no tensor of the target is encoded, or an encoding cannot be written.
    """
    if not tasks:
        return []
    target, part_name = output.role.checkpoint, names_of_parts(output)
    encoded = _encoded(target, stored_names(output))
    silent: list[TensorTask] = []
    written: list[TensorTask] = []
    for task in tasks:
        spec = encoded.get(task.name) if task.shard is not None else None
        if spec is None:
            written.append(task)
        elif task.operation is Operation.COPY:
            written += [_keep(part, part_name(part.name)) for part in spec.parts]
        else:
            values = TaskValues(spec.name, "F32", task.shape, spec.shard, _in_float32(task))
            found = _requantize(values, spec, target)
            written += [_keep(part, part_name(part.name)) for part in found.written]
            silent.append(_errors_of(task.name, found))
            # The new tasks read Δ in parts, and none of them computes its checksum.
            silent += [check_task(task)] if checks_itself(task) else []
    # What no weight depends on, such as scales of activations.
    known = {task.name for task in written}
    for part in target.weights.on_disk.values():
        if (name := part_name(part.name)) not in known:
            written.append(_keep(part, name))
    return [*silent, *written]


def _encoded(target: Checkpoint, name_of: Callable[[str], str]) -> dict[str, StoredTensor]:
    """The encoded tensors of the target, by the names that are written.

    Raises:
        OptionError: if there are none.
    """
    found = {
        name_of(name): spec
        for name, spec in target.tensors.items()
        if not isinstance(spec, TensorSpec)
    }
    if not found:
        problem = f"no tensor of {target.folder.name or target.folder} is quantised"
        raise OptionError(_OPTION, problem, f"leave out {_OPTION}")
    return found


def _requantize(values: TaskValues, spec: StoredTensor, target: Checkpoint) -> Requantized:
    found = requantize(values, spec) if values.shape == spec.shape else None
    if found is None:
        grown = values.shape != spec.shape
        what = "gains rows" if grown else f"is stored as {', '.join(target.weights.formats)}"
        problem = f"{spec.name} {what}, and cannot be written so"
        remedy = f"leave out {_OPTION}, and quantise the graft afterwards"
        raise OptionError(_OPTION, problem, remedy)
    return found


def _in_float32(task: TensorTask) -> TensorTask:
    return replace(task, dtype="F32", expected=None, sample=())


def _keep(part: StoredTensor, name: str) -> TensorTask:
    """The task that writes a part as it is."""
    return TensorTask(
        name=name,
        operation=Operation.KEEP,
        inputs=(part,),
        dtype=part.dtype,
        shape=part.shape,
        runs=whole(RunKind.COPY, 1),
        shard=part.shard.path.name,
    )


def _errors_of(name: str, found: Requantized) -> TensorTask:
    """The task that measures what was stored and what was there, each from the exact graft."""
    inputs = found.decoded, found.exact, found.original
    runs = whole(RunKind.GRAFT, 3)
    shape = found.exact.shape
    return TensorTask(_ERROR + name, Operation.DISTANCES, inputs, "F32", shape, runs=runs)


def stored_errors(results: Mapping[str, TensorResult]) -> tuple[StoredError, ...]:
    """The errors that the tasks have measured.

    Args:
        results: the results of tasks that write nothing, by name.

    Raises:
        OptionError: if a tensor has values that its format cannot hold.
    """
    found = []
    for name, result in results.items():
        if name.startswith(_ERROR):
            # ‖decoded − exact‖² and ‖original − exact‖²: see the kernel `distances`.
            error, change = result.sums[3:5] or (0.0, 0.0)
            tensor = name.removeprefix(_ERROR)
            if not math.isfinite(error):
                problem = f"{tensor} has values that are too large for the target's format"
                raise OptionError(_OPTION, problem, f"leave out {_OPTION}")
            found.append(StoredError(tensor, norm(change), norm(error)))
    return tuple(found)


def warnings_of_errors(errors: Sequence[StoredError]) -> list[str]:
    """A warning if the steps of the format swallow Δ.

    Args:
        errors: the errors, of every tensor that was quantised anew.
    """
    lost = sorted((each for each in errors if each.ratio >= SWALLOWED), key=lambda e: -e.ratio)
    if not lost:
        return []
    worst = lost[0]
    share = "all" if math.isinf(worst.ratio) else f"{worst.ratio:.0%}"
    return [
        f"the steps of the target's format swallow the change in {len(lost):,} of"
        f" {len(errors):,} quantised tensors: the error is {share} of ‖α·Δ‖ in {worst.name};"
        f" without {_OPTION} the graft is written in bfloat16"
    ]


def expected_losses(
    pairs: Iterable[tuple[Difference, StoredTensor]],
    manifest: Manifest,
    alpha_of: Callable[[str], float],
) -> list[str]:
    """A warning, before anything is computed, if the steps of the format will swallow Δ.

    Args:
        pairs: the tensors of a diff vector, each with the target's tensor that it is added to.
        manifest: the diff vector's, which has the norms.
        alpha_of: the scale of Δ for a tensor of the target.
    """
    lost, known = [], 0
    for difference, spec in pairs:
        entry = manifest.tensors.get(difference.name)
        step = typical_error(spec)
        if entry is None or step is None or not entry.delta_norm or not entry.base_norm:
            continue
        known += 1
        change = abs(alpha_of(spec.name)) * entry.delta_norm / entry.base_norm
        if change and step >= SWALLOWED * change:
            lost.append((step / change, spec.name))
    if not lost:
        return []
    ratio, name = max(lost)
    return [
        f"the steps of the target's format are about {ratio:.0%} of ‖α·Δ‖ in {name}, and"
        f" {SWALLOWED:.0%} or more in {len(lost):,} of {known:,} quantised tensors, where much of Δ"
        f" will be lost; without {_OPTION} the graft is written in bfloat16"
    ]


def note_of_decoding(target: Checkpoint) -> list[str]:
    """A note on what a graft of a quantised target is, if the target is quantised.

    Args:
        target: the target.
    """
    formats = target.weights.formats
    if not formats:
        return []
    encoded = [spec for spec in target.tensors.values() if not isinstance(spec, TensorSpec)]
    named = " and ".join(formats)
    can = all(typical_error(spec) is not None for spec in encoded)
    more = f"; {_OPTION} writes it in the target's format" if can else ""
    return [
        f"the target is quantised ({named}): the graft is written in bfloat16, and its config has"
        f" no quantization_config{more}"
    ]
