"""How much disk a chain takes at most, before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import list_companions
from diffxfer.recycling.chain_plan import Step, StepKind, removable_folders
from diffxfer.recycling.training_options import peak_training_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a model is.

    Attributes:
        disk_bytes: of its shards and companions.
        parameters: the elements of its tensors.
    """

    disk_bytes: int
    parameters: int


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """How large a model on disk is.

    Args:
        checkpoint: the model.
    """
    folder = checkpoint.folder
    companions = ((folder / name).stat().st_size for name in list_companions(folder).names)
    shards = (shard.size for shard in checkpoint.weights.shards)
    return ModelSize(sum(shards) + sum(companions), checkpoint.elements)


def peak_disk_bytes(
    pending: Sequence[Step], steps: Sequence[Step], recipe: Recipe, sizes: Mapping[str, ModelSize]
) -> int:
    """The disk that the steps to do take at most, beyond what is there.

    Args:
        pending: the steps to do.
        steps: of the whole chain.
        recipe: what stays.
        sizes: of every model that the recipe names.

    Returns:
        Bytes. What a command of the user's own needs beside its output is not known.
    """
    known = {Path(path): size for path, size in sizes.items()}
    for step in steps:
        if step.out is not None and step.kind is not StepKind.SCORE:
            known[step.out] = _output(step, known)
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


def leftovers(step: Step) -> list[Path]:
    """The hidden folders in which a step that was cut off left what it can continue from.

    Args:
        step: the step.
    """
    if step.out is None or step.kind is StepKind.SCORE:
        return []
    beside = (".tuning", ".command", ".partial-*")
    return [path for end in beside for path in step.out.parent.glob(f".{step.out.name}{end}")]


def reusable_bytes(pending: Sequence[Step]) -> int:
    """The disk that the steps to do hold already: what they will replace, or continue from.

    Args:
        pending: the steps to do.
    """
    folders = [path for step in pending for path in (*leftovers(step), step.out)]
    made = [path for path in folders if path is not None and path.is_dir()]
    files = {file for folder in made if folder.name != "scores" for file in folder.rglob("*")}
    return sum(file.lstat().st_size for file in files if file.is_file())


def _output(step: Step, known: Mapping[Path, ModelSize]) -> ModelSize:
    """The size of what a step makes: a graft's is its base's, any other's what it is made from."""
    grafts = step.kind in (StepKind.GRAFT, StepKind.CHOOSE)
    return known[step.inputs[1] if grafts else step.inputs[0]]


def _while_doing(step: Step, known: Mapping[Path, ModelSize], recipe: Recipe) -> int:
    """What a step takes until it is done."""
    if step.kind is StepKind.SCORE:
        return 0
    made, train = _output(step, known), recipe.train
    if step.kind is StepKind.TUNE and train is not None and train.steps is not None:
        return peak_training_bytes(made.disk_bytes, made.parameters, train.steps, train.save_every)
    return made.disk_bytes
