"""The options of tuning, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffxfer.errors import OptionError

# Both are in the grid of the paper. On the shipped family, T = 1 adds next to nothing to the rows,
# since the teacher is sure of every answer; T = 5 also keeps more of what the student knew.
DISTILL_WEIGHT = 0.7
TEMPERATURE = 5.0
DISTILLATION_DEFAULTS = {
    "distill_weight": DISTILL_WEIGHT,
    "temperature": TEMPERATURE,
    "hidden_weight": 0.0,
}


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What shapes a tuned model, beside its inputs.

    Attributes:
        steps: how many times the optimizer steps.
        learning_rate: the first step's; it falls linearly to zero.
        batch_size: rows a process takes at a time.
        gradient_accumulation: how many such batches a step takes.
        gradient_checkpointing: compute activations twice instead of keeping them.
        max_length: tokens of a row; what is longer is cut.
        seed: of the rows' order and of dropout.
        distill_weight: w of the loss, where there is a teacher.
        temperature: T of the loss.
        hidden_weight: b of the loss.
        save_every: steps from one resumable state to the next; None for a tenth of all, 50 at
            least.
    """

    steps: int
    learning_rate: float
    batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    max_length: int
    seed: int
    distill_weight: float
    temperature: float
    hidden_weight: float
    save_every: int | None

    @property
    def save_interval(self) -> int:
        """Steps from one resumable state to the next."""
        return _save_interval(self.steps, self.save_every)

    def recorded(self, *, distilled: bool) -> dict[str, float]:
        """What a manifest says of them: all that shapes the result.

        Args:
            distilled: whether there is a teacher.
        """
        names = ["steps", "learning_rate", "batch_size", "gradient_accumulation", "max_length"]
        names += [
            "seed",
            *(("distill_weight", "temperature", "hidden_weight") if distilled else ()),
        ]
        return {name: getattr(self, name) for name in names}


def _save_interval(steps: int, save_every: int | None) -> int:
    return save_every or max(50, steps // 10)


def peak_training_bytes(
    result_bytes: int, parameters: int, steps: int, save_every: int | None
) -> int:
    """The disk that training takes at most, its result included.

    Args:
        result_bytes: of what it makes.
        parameters: of the model; in a state, each is a float32, and so are AdamW's two moments.
        steps: see `TuneOptions`.
        save_every: see `TuneOptions`.
    """
    states = min(2, (steps - 1) // _save_interval(steps, save_every))
    return result_bytes + 4 * parameters * (3 * states + 1)


def check_options(options: TuneOptions, *, distilled: bool, device: str | None) -> None:
    """Refuse options that cannot mean anything.

    Args:
        options: what was asked for.
        distilled: whether there is a teacher.
        device: what to compute on.

    Raises:
        OptionError: at the first such option.
    """
    least = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "max_length": 2, "seed": 0}
    if options.save_every is not None:
        least["save_every"] = 1
    for name, lowest in least.items():
        value = getattr(options, name)
        if value < lowest:
            raise OptionError(_flag(name), f"{value} is too small", f"give {lowest} or more")
    if options.seed >= 1 << 32:
        raise OptionError("--seed", f"{options.seed} is too large", "give one below 2³²")
    for name in ("learning_rate", "temperature"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise OptionError(_flag(name), f"{value} is no number above 0", "give one such as 1.0")
    if not 0 <= options.distill_weight <= 1:
        problem = f"{options.distill_weight} is not between 0 and 1"
        raise OptionError("--distill-weight", problem, "give one such as 0.7")
    if not 0 <= options.hidden_weight < math.inf:
        problem = f"{options.hidden_weight} is no number from 0 on"
        raise OptionError("--hidden-weight", problem, "give one such as 1.0")
    if not distilled:
        _refuse_without_teacher(options)
    if device not in (None, "cpu", "cuda"):
        raise OptionError("device", f"{device!r} is unknown", "give cpu or cuda")


def _refuse_without_teacher(options: TuneOptions) -> None:
    for name, default in DISTILLATION_DEFAULTS.items():
        if getattr(options, name) != default:
            raise OptionError(_flag(name), "means nothing without a teacher", "give --teacher too")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
