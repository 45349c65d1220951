"""Reading a recipe: a YAML file, validated key by key."""

from __future__ import annotations

import re
import reprlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diffxfer.checkpoints.hub.repo_ids import read_hub_id
from diffxfer.errors import RecipeError
from diffxfer.recycling.recipe import PREVIOUS, SECTIONS, Recipe
from diffxfer.recycling.training_data import is_local_file

_MAX_BYTES = 1_000_000
_PATHS = "give a path relative to the folder of the recipe"


class _Loader(yaml.SafeLoader):
    """Reads YAML without duplicate keys and aliases.

    The first of two equal keys would be lost silently. A few lines of aliases can expand to more
    values than memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases such as *name are not supported: repeat the value")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        name = loader.construct_object(key, deep=True)
        if name in seen:
            raise yaml.YAMLError(f"{name} appears twice")
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# A number in YAML 1.2 and in JSON, text in YAML 1.1, which PyYAML reads: 1e-5.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML or JSON file; relative paths in it are relative to its folder.

    Returns:
        The recipe with absolute paths; names of models on the Hub are unchanged.

    Raises:
        RecipeError: if the file cannot be read, or a key or value is invalid.
    """
    try:
        if not path.is_file() and path.exists():
            raise RecipeError(path, "is not a file", "give the recipe, a YAML file")
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(path, "is too large for a recipe", "check the path")
        text = path.read_text("utf-8")
        if text.lstrip().startswith("{"):  # JSON; unlike YAML, it may be indented with tabs
            text = text.replace("\t", " ")
        document = yaml.load(text, _Loader)
    except FileNotFoundError as exc:
        raise RecipeError(path, "no such file", "give the recipe, a YAML file") from exc
    except OSError as exc:
        raise RecipeError(path, f"cannot be read ({exc.strerror})", "check the path") from exc
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as exc:
        reason = " ".join(str(exc).split())
        raise RecipeError(path, f"is not valid YAML ({reason})", "correct it") from exc
    if not isinstance(document, dict):
        raise RecipeError(path, "is not a mapping", "begin with bases: [old, new]")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as exc:
        raise _refusal(path, document, exc) from exc
    return _resolve(recipe, path.absolute().parent)


def _refusal(path: Path, document: dict[Any, Any], exc: ValidationError) -> RecipeError:
    """The error for the first invalid key."""
    errors = exc.errors(include_url=False)
    keys = [_key(document, error["loc"]) for error in errors]
    # A key that may have several types has an error for each; the deepest one is most specific.
    alike = [(k, e) for k, e in zip(keys, errors, strict=True) if k[:1] == keys[0][:1]]
    deepest = max(len(key) for key, _ in alike)
    key, first = next((k, e) for k, e in alike if len(k) == deepest)
    where = f"{path}: {'.'.join(key)}" if key else str(path)
    if first["type"] == "extra_forbidden":
        known = sorted(SECTIONS.get(key[0] if len(key) > 1 else "", Recipe).model_fields)
        near = get_close_matches(key[-1], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        return RecipeError(where, "is not a recipe key", remedy)
    said = [e["msg"].removeprefix("Value error, ") for k, e in alike if k == key]
    message = " or ".join(dict.fromkeys(text[:1].lower() + text[1:] for text in said))
    absent = first["type"] in ("missing", "value_error")
    found = "" if absent else f", found {reprlib.repr(first['input'])}"
    return RecipeError(where, f"{message}{found}"[:300], "correct the recipe")


def _key(document: Any, place: tuple[int | str, ...]) -> tuple[str, ...]:
    """The key of an error in the document; pydantic's location also names the types it tried."""
    found: list[str] = []
    for number, part in enumerate(place):
        there = isinstance(document, dict) and part in document
        if there or (isinstance(document, list) and isinstance(part, int)):
            document = document[part]
        elif not (isinstance(document, dict) and number == len(place) - 1 and not found[1:]):
            continue
        found.append(str(part))
    return tuple(found)


def _resolve(recipe: Recipe, home: Path) -> Recipe:
    """The recipe with absolute paths; data that is not a local file is the id of a dataset."""

    def folder(name: str) -> str:
        return str(home / Path(name).expanduser())

    def model(name: str) -> str:
        return folder(name) if read_hub_id(name) is None or Path(folder(name)).exists() else name

    train, scored = recipe.train, recipe.eval
    if train is not None:
        changed: dict[str, str] = {}
        if train.teacher not in (None, PREVIOUS):
            changed["teacher"] = model(str(train.teacher))
        if train.data is not None and (
            is_local_file(train.data) or Path(folder(train.data)).exists()
        ):
            changed["data"] = folder(train.data)
            if not Path(changed["data"]).is_file():
                raise RecipeError(
                    changed["data"], "is named by train.data, but is not a file", _PATHS
                )
        train = train.model_copy(update=changed)
    if scored is not None and scored.include_path is not None:
        scored = scored.model_copy(update={"include_path": folder(scored.include_path)})
    return recipe.model_copy(
        update={
            "bases": [model(base) for base in recipe.bases],
            "finetuned": None if recipe.finetuned is None else model(recipe.finetuned),
            "train": train,
            "eval": scored,
        }
    )
