"""The models that a recipe names: opening, checking and downloading them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.fetch import fetch_shards, missing_files
from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.artifact.kind import refuse_diff
from diffxfer.diffs.delta.from_checkpoints import read_roles
from diffxfer.errors import OptionError
from diffxfer.recycling.chain_heads import check_heads
from diffxfer.recycling.labels import prepare_labels
from diffxfer.recycling.objectives import (
    CLASSIFICATION,
    check_objective,
    choose_objective,
    rows_accepted,
)
from diffxfer.recycling.recipe import PREVIOUS, Recipe
from diffxfer.recycling.recipe_file import read_recipe
from diffxfer.recycling.training_data import is_local_file, read_rows
from diffxfer.recycling.tune import require_trl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.recipe import TrainSection


@dataclass(frozen=True, slots=True)
class ChainInputs:
    """The recipe and its models.

    Attributes:
        plan: the recipe, with the folders of its models.
        models: the models by folder; a LoRA adapter stands for the model that it makes of base.
        is_adapter: whether `finetuned` is a LoRA adapter.
    """

    plan: Recipe
    models: Mapping[str, Checkpoint]
    is_adapter: bool


def open_inputs(path: Path, from_round: int | None, tell: Callable[[str], None]) -> ChainInputs:
    """Read a recipe, and check and open its models; reads no weights.

    Args:
        path: the recipe.
        from_round: the value of ``--from-round``.
        tell: called with a line about whether base is the one that an adapter names.

    Raises:
        DiffxferError: if the recipe, a model or the training data cannot be used.
    """
    plan = read_recipe(path)
    _check_round(plan, from_round)
    if plan.train is not None and plan.train.command is None:
        require_trl()
    places = {name: find(name, f"the {role} checkpoint") for name, role in _roles(plan).items()}
    adapter = places.get(plan.finetuned or "")
    if adapter is not None and not is_adapter(adapter):
        adapter = None
    models: dict[str, Checkpoint] = {}
    for name, role in _roles(plan).items():
        place = places[name]
        refuse_diff(place.folder, role)
        if place is adapter:
            models[str(place.folder)] = _adapted(name, plan.bases[0], tell)
        else:
            models[str(place.folder)] = open_checkpoint(place, role)
    plan = plan.with_folders({name: str(place.folder) for name, place in places.items()})
    check_heads(plan)
    if plan.train is not None and plan.train.command is None:
        _check_rows(plan.train, models[plan.finetuned or plan.bases[0]])
    return ChainInputs(plan, models, adapter is not None)


def _check_rows(train: TrainSection, first: Checkpoint) -> None:
    """Check that the first model of the chain can learn from the rows.

    Args:
        train: how each round trains.
        first: the fine-tuned model, or the first base if that is trained first.
    """
    check_objective(first, train.objective)
    if not is_local_file(str(train.data)):
        return
    rows = read_rows(str(train.data), rows_accepted(first, train.objective))
    if choose_objective(first, rows, train.objective) == CLASSIFICATION:
        prepare_labels(first, None, rows)


def _roles(plan: Recipe) -> dict[str, str]:
    """The models that a recipe names, with the words for each in messages."""
    roles = {base: f"base {number}" for number, base in enumerate(plan.bases, 1)}
    if plan.train is not None and plan.train.teacher not in (None, PREVIOUS):
        roles[str(plan.train.teacher)] = "teacher"
    if plan.finetuned is not None:
        roles[plan.finetuned] = "finetuned"
    return roles


def _adapted(adapter: str, base: str, tell: Callable[[str], None]) -> Checkpoint:
    """The model that an adapter makes of the first base."""
    role = read_roles({"finetuned": adapter, "base": base})["finetuned"]
    for note in role.notes:
        tell(note)
    return role.checkpoint


def _check_round(plan: Recipe, from_round: int | None) -> None:
    if from_round is not None and not 1 <= from_round <= len(plan.bases):
        problem = f"{from_round} is not a round of this recipe"
        raise OptionError("--from-round", problem, f"give 1 to {len(plan.bases)}")


def download(
    opened: Mapping[str, Checkpoint],
    tell: Callable[[str], None],
    moved: Callable[[int, int], None] | None,
) -> None:
    """Download the shards that are not on this machine.

    Args:
        opened: the models by folder.
        tell: called with a line for each repository.
        moved: called with the bytes done and the total.
    """
    shards = [shard for checkpoint in opened.values() for shard in checkpoint.weights.shards]
    for repo in sorted({file.repo for file in missing_files(shards)}):
        tell(f"downloading {repo} from the Hub")
    fetch_shards(shards, moved)
