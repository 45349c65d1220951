"""The heads of the models of a chain: those that fine-tuning added or that scoring needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_CONFIG
from diffxfer.checkpoints.companions import read_config
from diffxfer.errors import RecipeError
from diffxfer.evaluation.head_labels import is_classifier
from diffxfer.recycling.objectives import CLASSIFICATION

if TYPE_CHECKING:
    from diffxfer.recycling.recipe import Recipe

_CLASSIFIER = "classifier"
_LANGUAGE_MODELS = "hf"


def added_head(recipe: Recipe, finetuned: Path, base: Path) -> str:
    """What to do with a head that fine-tuning added.

    Args:
        recipe: the recipe.
        finetuned: the folder of the fine-tuned model, or of a LoRA adapter.
        base: the folder of its base.

    Returns:
        A value of ``--added``. Unless the recipe says what, a classification head is brought where
        the base has none, since the rounds go on with it.
    """
    if recipe.added is not None:
        return recipe.added
    return "bring" if _has_head(finetuned) and not _has_head(base) else "refuse"


def check_heads(recipe: Recipe) -> None:
    """Check that the backend of a chain can score the models that will be made.

    Args:
        recipe: the recipe, with the folders of its models.

    Raises:
        RecipeError: if it runs classifiers and a base without a head is scored alone, or if it
            runs language models and the chain makes classifiers.
    """
    if recipe.eval is None:
        return
    backend = recipe.eval.backend
    if backend == _CLASSIFIER and "base" in recipe.controls:
        for base in recipe.bases:
            if not _has_head(Path(base)):
                raise RecipeError(
                    "controls",
                    f"has base, but {base} has no classification head to score",
                    "give controls: [direct], or controls: []",
                )
    if backend == _LANGUAGE_MODELS:
        trained = recipe.train is not None and recipe.train.objective == CLASSIFICATION
        if trained or (recipe.finetuned is not None and _has_head(Path(recipe.finetuned))):
            problem = f"is {backend}, which scores language models, but the chain makes classifiers"
            raise RecipeError("eval.backend", problem, f"give backend: {_CLASSIFIER}")


def _has_head(folder: Path) -> bool:
    """Whether a model is a classifier; a LoRA adapter has no config of a model."""
    return not (folder / ADAPTER_CONFIG).exists() and is_classifier(read_config(folder))
