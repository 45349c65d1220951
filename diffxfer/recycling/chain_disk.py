"""An estimate of the disk space that a chain needs, made before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import list_companions
from diffxfer.diffs.delta.from_adapter import LORA
from diffxfer.recycling.chain_plan import ROUNDS_AT_ONCE, Step, StepKind, removable_folders
from diffxfer.recycling.training_options import peak_training_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The size of a model.

    Attributes:
        disk_bytes: the size of its shards and companions.
        parameters: the number of elements of its tensors.
    """

    disk_bytes: int
    parameters: int


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """Measure a model on disk.

    Args:
        checkpoint: the model; one that is made of a LoRA adapter has the size that it would have.
    """
    folder = checkpoint.folder
    companions = ((folder / name).stat().st_size for name in list_companions(folder).names)
    if LORA in checkpoint.weights.formats:
        shards = [spec.nbytes for spec in checkpoint.tensors.values()]
    else:
        shards = [shard.size for shard in checkpoint.weights.shards]
    return ModelSize(sum(shards) + sum(companions), checkpoint.elements)


def peak_disk_bytes(
    pending: Sequence[Step], steps: Sequence[Step], recipe: Recipe, sizes: Mapping[str, ModelSize]
) -> int:
    """The maximum disk space that the pending steps need, beyond what is used now.

    Args:
        pending: the steps that are not done.
        steps: all steps of the chain.
        recipe: the recipe, which says what is kept.
        sizes: the size of each model that the recipe names, by path.

    Returns:
        Bytes. Temporary files of a custom training command are not included.
    """
    known = _sizes(steps, sizes)
    done = {step.key for step in steps} - {step.key for step in pending}
    there: set[Path] = set()
    peak = 0
    for step in pending:
        now = sum(known[path].disk_bytes for path in there)
        peak = max(peak, now + _while_doing(step, known, recipe))
        if step.out is not None and step.kind is not StepKind.SCORE:
            there.add(step.out)
        done.add(step.key)
        there -= set(removable_folders(steps, done, recipe.keep))
    return peak


def peak_disk_bytes_at_once(
    pending: Sequence[Step], steps: Sequence[Step], recipe: Recipe, sizes: Mapping[str, ModelSize]
) -> int:
    """As `peak_disk_bytes`, if the steps of `ROUNDS_AT_ONCE` rounds may all run at once."""
    known = _sizes(steps, sizes)
    settled = {step.key for step in steps} - {step.key for step in pending}
    peak = 0
    for first in {step.round for step in pending}:
        before = [step for step in pending if step.round < first]
        gone = removable_folders(steps, settled | {step.key for step in before}, recipe.keep)
        there = {step.out for step in before if step.kind is not StepKind.SCORE} - {None, *gone}
        now = sum(known[path].disk_bytes for path in there if path is not None)
        at_once = [step for step in pending if first <= step.round < first + ROUNDS_AT_ONCE]
        peak = max(peak, now + sum(_while_doing(step, known, recipe) for step in at_once))
    return peak


def _sizes(steps: Sequence[Step], sizes: Mapping[str, ModelSize]) -> dict[Path, ModelSize]:
    """The size of every folder of a chain."""
    known = {Path(path): size for path, size in sizes.items()}
    for step in steps:
        if step.out is not None and step.kind is not StepKind.SCORE:
            known[step.out] = _output(step, known)
    return known


def leftovers(step: Step) -> list[Path]:
    """The hidden folders from which an interrupted step can be resumed.

    Args:
        step: the step.
    """
    if step.out is None or step.kind is StepKind.SCORE:
        return []
    beside = (".tuning", ".command", ".partial-*")
    return [path for end in beside for path in step.out.parent.glob(f".{step.out.name}{end}")]


def reusable_bytes(pending: Sequence[Step]) -> int:
    """The disk space that the pending steps use already and will replace or reuse.

    Args:
        pending: the steps that are not done.
    """
    folders = [path for step in pending for path in (*leftovers(step), step.out)]
    made = [path for path in folders if path is not None and path.is_dir()]
    files = {file for folder in made if folder.name != "scores" for file in folder.rglob("*")}
    return sum(file.lstat().st_size for file in files if file.is_file())


def _output(step: Step, known: Mapping[Path, ModelSize]) -> ModelSize:
    """The size of a step's result: that of the base for a graft, else that of the first input.

    A packed diff vector is smaller than the model, but by how much depends on its values.
    """
    grafts = step.kind in (StepKind.GRAFT, StepKind.CHOOSE)
    return known[step.inputs[1] if grafts else step.inputs[0]]


def _while_doing(step: Step, known: Mapping[Path, ModelSize], recipe: Recipe) -> int:
    """The disk space that a step needs while it runs."""
    if step.kind is StepKind.SCORE:
        return 0
    made, train = _output(step, known), recipe.train
    if step.kind is StepKind.EXTRACT:
        return 2 * made.disk_bytes  # packed, it waits in a temporary file until its size is known
    if step.kind is StepKind.TUNE and train is not None and train.steps is not None:
        return peak_training_bytes(made.disk_bytes, made.parameters, train.steps, train.save_every)
    return made.disk_bytes
