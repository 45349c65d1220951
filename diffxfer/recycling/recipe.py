"""The recipe of a chain: a YAML file, validated key by key."""

from __future__ import annotations

import re
import reprlib
import shlex
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffxfer.checkpoints.hub.repo_ids import read_hub_id
from diffxfer.errors import RecipeError
from diffxfer.recycling.training_data import is_local_file
from diffxfer.recycling.training_options import WARMUP

if TYPE_CHECKING:
    from collections.abc import Mapping

PREVIOUS = "previous"
_MAX_BYTES = 1_000_000
_PATHS = "give a path relative to the folder of the recipe"

Alpha = Annotated[float, Field(allow_inf_nan=False)]
# No path and no argument of a program can hold NUL.
Name = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


class _Section(BaseModel):
    # Strict: `steps: yes` is not 1 step.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrainSection(_Section):
    """How each round trains: the options of `diffxfer.tune`, or a custom command.

    Attributes:
        command: run without a shell; ``{model}``, ``{output}``, ``{round}`` and ``{teacher}`` are
            replaced. The only other key that may be given is `teacher`.
        teacher: a folder, or ``"previous"`` for the model of the previous round.
    """

    data: Name | None = None
    objective: Literal["causal", "classification", "mlm"] | None = None
    steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(2e-5, gt=0, allow_inf_nan=False)
    warmup: float = Field(WARMUP, ge=0, allow_inf_nan=False)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    max_length: int = Field(1024, ge=2)
    end_token: bool = True
    seed: int = Field(0, ge=0, lt=1 << 32)
    save_every: int | None = Field(None, ge=1)
    device: Literal["cpu", "cuda"] | None = None
    teacher: Name | None = None
    distill_weight: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(None, gt=0, allow_inf_nan=False)
    hidden_weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    command: Name | None = None

    @model_validator(mode="after")
    def _check_training_method(self) -> TrainSection:
        distills = (self.distill_weight, self.temperature, self.hidden_weight)
        if self.command is not None:
            beside = self.model_fields_set - {"command", "teacher"}
            if beside:
                raise ValueError(f"{min(beside)} has no effect with a command; remove it")
            _check_command(self.command, self.teacher)
        elif self.data is None or self.steps is None:
            raise ValueError("needs data and steps, or a command")
        elif self.teacher is None and any(value is not None for value in distills):
            raise ValueError("distillation needs a teacher, such as previous")
        return self


def _check_command(command: str, teacher: str | None) -> None:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise ValueError(f"command cannot be split into words ({exc})") from exc
    for placeholder in ("{model}", "{output}"):
        if not any(placeholder in word for word in words):
            raise ValueError(f"command lacks {placeholder}")
    if teacher is None and any("{teacher}" in word for word in words):
        raise ValueError("command has {teacher}, but no teacher is given")


class EvalSection(_Section):
    """How each round is scored: the options of `diffxfer.evaluate`."""

    tasks: list[Name] = Field(min_length=1)
    include_path: Name | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int | str = 1
    device: str | None = None
    dtype: str = "auto"
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: str | dict[str, Any] | None = None
    backend: str = "hf"
    model_args: str | dict[str, Any] | None = None
    seed: int | str | list[int | None] | None = None
    trust_remote_code: bool = False


class Recipe(_Section):
    """A chain of bases, and what is done with each.

    Attributes:
        bases: folders, or models on the Hub, oldest first.
        finetuned: M*1, the fine-tuned model of the first base, or a LoRA adapter for that base;
            None to train it from that base.
        mode: ``"iter"``: Δ = M*(i−1) − M(i−1) of the recycled and tuned model; ``"dir"``: Δ of
            the previous base and its direct fine-tuning. See Lin et al. 2025, section 6.
        alpha: the scale of Δ, or several, from which the first eval task chooses.
        train: how each round trains; None for rounds without training.
        eval: how each round is scored; None for no scores.
        added: what happens to a head that fine-tuning added: ``"bring"``, ``"drop"`` or
            ``"refuse"``, as in `diffxfer.transfer`. None: a classification head is brought where
            the base has none, and any other added head is refused.
        controls: which models are scored for comparison: each base, and each base that is
            fine-tuned directly. With a teacher also each graft that is tuned without it
            (``"initialised"``), and each base that is fine-tuned directly with it
            (``"distilled"``): these and ``"direct"`` are the other arms of Qin et al. 2023.
        keep: which folders stay on disk: all, the models, or the last model.
    """

    bases: list[Name] = Field(min_length=2)
    finetuned: Name | None = None
    mode: Literal["iter", "dir"] = "iter"
    alpha: Alpha | list[Alpha] = 1.0
    train: TrainSection | None = None
    eval: EvalSection | None = None
    added: Literal["bring", "drop", "refuse"] | None = None
    controls: list[Literal["base", "direct", "initialised", "distilled"]] = ["base"]
    keep: Literal["all", "models", "last"] = "all"

    @property
    def alphas(self) -> list[float]:
        """The scales without duplicates."""
        given = self.alpha if isinstance(self.alpha, list) else [self.alpha]
        return list(dict.fromkeys(given))

    @property
    def trains_without_teacher(self) -> bool:
        """Whether the chain trains a model, such as a base directly, that has no teacher."""
        between = self.mode == "dir" and len(self.bases) > 2
        plain = {"direct", "initialised"}.intersection(self.controls)
        return self.finetuned is None or bool(plain) or between

    def with_folders(self, folders: Mapping[str, str]) -> Recipe:
        """The recipe with each model name replaced by its folder.

        Args:
            folders: the folder of every model, by the name that the recipe gives.
        """
        train = self.train
        if train is not None and train.teacher is not None and train.teacher in folders:
            train = train.model_copy(update={"teacher": folders[train.teacher]})
        return self.model_copy(
            update={
                "bases": [folders[base] for base in self.bases],
                "finetuned": None if self.finetuned is None else folders[self.finetuned],
                "train": train,
            }
        )

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        if self.finetuned is None and self.train is None:
            raise ValueError("needs finetuned, or train to make it from the first base")
        if self.mode == "dir" and self.train is None and len(self.bases) > 2:
            raise ValueError("mode dir fine-tunes each base directly, which requires train")
        if "direct" in self.controls and self.train is None:
            raise ValueError(
                "the control direct fine-tunes each base directly, which requires train"
            )
        taught = {"initialised", "distilled"}.intersection(self.controls)
        if taught and (self.train is None or self.train.teacher is None):
            raise ValueError(
                f"the control {min(taught)} compares training with and without a teacher, which"
                " requires train.teacher"
            )
        if not self.alphas:
            raise ValueError("alpha is empty")
        if len(self.alphas) > 1 and self.eval is None:
            raise ValueError("choosing among several alphas requires eval")
        command = self.train.command if self.train is not None else None
        if command is not None and "{teacher}" in command and self.trains_without_teacher:
            raise ValueError(
                "command has {teacher}, but a base that is fine-tuned directly has none: give "
                "finetuned, and neither mode dir nor the controls direct and initialised"
            )
        return self


def with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Add default values for keys that an older version did not store.

    Args:
        recipe: the stored recipe as JSON values; it is not validated.
    """
    filled = _defaults(Recipe) | dict(recipe)
    for key, part in _SECTIONS.items():
        if isinstance(filled[key], dict):
            filled[key] = _defaults(part) | _BEFORE.get(key, {}) | filled[key]
    return filled


def _defaults(part: type[_Section]) -> dict[str, Any]:
    fields = part.model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required()}


_BEFORE: dict[str, dict[str, Any]] = {"train": {"warmup": 0.0}}
"""What a chain did before the key existed, where that is not the key's default."""

_SECTIONS: dict[str, type[_Section]] = {"train": TrainSection, "eval": EvalSection}


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
        known = sorted(_SECTIONS.get(key[0] if len(key) > 1 else "", Recipe).model_fields)
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
