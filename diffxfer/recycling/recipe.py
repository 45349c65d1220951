"""The recipe of a chain: its keys and what they may be."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffxfer.recycling.training_options import WARMUP

if TYPE_CHECKING:
    from collections.abc import Mapping

PREVIOUS = "previous"

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
    def _check_keys(self) -> Recipe:
        _check_consistency(self)
        return self


def _check_consistency(recipe: Recipe) -> None:
    """Check that keys, each valid alone, go together."""
    if recipe.finetuned is None and recipe.train is None:
        raise ValueError("needs finetuned, or train to make it from the first base")
    if recipe.mode == "dir" and recipe.train is None and len(recipe.bases) > 2:
        raise ValueError("mode dir fine-tunes each base directly, which requires train")
    if not recipe.alphas:
        raise ValueError("alpha is empty")
    if len(recipe.alphas) > 1 and recipe.eval is None:
        raise ValueError("choosing among several alphas requires eval")
    _check_controls(recipe)
    _check_placeholder(recipe)


def _check_controls(recipe: Recipe) -> None:
    if "direct" in recipe.controls and recipe.train is None:
        raise ValueError("the control direct fine-tunes each base directly, which requires train")
    taught = {"initialised", "distilled"}.intersection(recipe.controls)
    if taught and (recipe.train is None or recipe.train.teacher is None):
        raise ValueError(
            f"the control {min(taught)} compares training with and without a teacher, which"
            " requires train.teacher"
        )


def _check_placeholder(recipe: Recipe) -> None:
    command = recipe.train.command if recipe.train is not None else None
    if command is not None and "{teacher}" in command and recipe.trains_without_teacher:
        raise ValueError(
            "command has {teacher}, but a base that is fine-tuned directly has none: give"
            " finetuned, and neither mode dir nor the controls direct and initialised"
        )


def with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Add default values for keys that an older version did not store.

    Args:
        recipe: the stored recipe as JSON values; it is not validated.
    """
    filled = _defaults(Recipe) | dict(recipe)
    for key, part in SECTIONS.items():
        if isinstance(filled[key], dict):
            filled[key] = _defaults(part) | _BEFORE.get(key, {}) | filled[key]
    return filled


def _defaults(part: type[_Section]) -> dict[str, Any]:
    fields = part.model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required()}


_BEFORE: dict[str, dict[str, Any]] = {"train": {"warmup": 0.0}}
"""What a chain did before the key existed, where that is not the key's default."""

SECTIONS: dict[str, type[_Section]] = {"train": TrainSection, "eval": EvalSection}
