"""The options of `tune`, validated before any file is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffxfer.errors import OptionError
from diffxfer.recycling.objectives import CAUSAL, check_known_objective

# Both values are in the grid of the paper. On the shipped family, T = 1 adds almost nothing to the
# rows, since the teacher is certain of every answer; T = 5 also preserves more of what the student
# knew before.
DISTILL_WEIGHT = 0.7
TEMPERATURE = 5.0
DISTILLATION_DEFAULTS = {
    "distill_weight": DISTILL_WEIGHT,
    "temperature": TEMPERATURE,
    "hidden_weight": 0.0,
}


# Measured on the shipped family; examples/tuning/README.md has the figures.
WARMUP = 0.1


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """The options that, beside the inputs, determine the trained model.

    Attributes:
        objective: what is predicted: ``"causal"``, ``"classification"`` or ``"mlm"``; None until
            the model and the rows decide.
        steps: the number of optimizer steps.
        learning_rate: of the first step after the warm-up; it decays linearly to zero.
        warmup: the steps in which the learning rate rises from zero; below 1, a share of all steps.
        batch_size: rows per process and batch.
        gradient_accumulation: batches per step.
        gradient_checkpointing: recompute activations instead of storing them.
        max_length: the maximum number of tokens of a row; longer rows are truncated.
        end_token: end each text or completion with the end-of-text token; for ``"causal"`` alone.
        seed: of the order of the rows, of dropout, of masks and of a new head.
        distill_weight: the weight w of the loss, if there is a teacher.
        temperature: the temperature T of the loss.
        hidden_weight: the weight b of the loss.
        save_every: steps between resumable states; None for a tenth of all steps, but at least 50.
    """

    objective: str | None
    steps: int
    learning_rate: float
    warmup: float
    batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    max_length: int
    end_token: bool
    seed: int
    distill_weight: float
    temperature: float
    hidden_weight: float
    save_every: int | None

    @property
    def save_interval(self) -> int:
        """The number of steps between resumable states."""
        return _save_interval(self.steps, self.save_every)

    @property
    def warmup_steps(self) -> int:
        """The number of steps of warm-up; a share of all steps is rounded down.

        The learning rate of the first of them is 0, so rounding up would waste a single step.
        """
        if self.warmup >= 1:
            return int(self.warmup)
        return math.floor(self.warmup * self.steps + 1e-9)  # 0.29 · 100 is 28.999…

    def recorded(self, *, distilled: bool) -> dict[str, str | float]:
        """The options that the manifest records: those that determine the result.

        Args:
            distilled: whether there is a teacher.
        """
        names = [
            *("objective", "steps", "learning_rate", "batch_size", "gradient_accumulation"),
            *("max_length", "seed"),
            *(("distill_weight", "temperature", "hidden_weight") if distilled else ()),
        ]
        found = {name: getattr(self, name) for name in names}
        found["warmup"] = self.warmup_steps
        return found | ({"end_token": self.end_token} if self.objective == CAUSAL else {})


def _save_interval(steps: int, save_every: int | None) -> int:
    return save_every or max(50, steps // 10)


def peak_training_bytes(
    result_bytes: int, parameters: int, steps: int, save_every: int | None
) -> int:
    """The maximum disk space that training uses, including its result.

    Args:
        result_bytes: the size of the result.
        parameters: the number of parameters; a state stores each one and AdamW's two moments of it
            in float32.
        steps: see `TuneOptions`.
        save_every: see `TuneOptions`.
    """
    states = min(2, (steps - 1) // _save_interval(steps, save_every))
    return result_bytes + 4 * parameters * (3 * states + 1)


def check_options(options: TuneOptions, *, distilled: bool, device: str | None) -> None:
    """Check the values of the options.

    Args:
        options: the options of the run.
        distilled: whether there is a teacher.
        device: the device to compute on.

    Raises:
        OptionError: for the first invalid option.
    """
    check_known_objective(options.objective)
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
            raise OptionError(
                _flag(name), f"{value} is not a number above 0", "give one such as 1.0"
            )
    _check_warmup(options)
    if not 0 <= options.distill_weight <= 1:
        problem = f"{options.distill_weight} is not between 0 and 1"
        raise OptionError("--distill-weight", problem, "give one such as 0.7")
    if not 0 <= options.hidden_weight < math.inf:
        problem = f"{options.hidden_weight} is not a number of at least 0"
        raise OptionError("--hidden-weight", problem, "give one such as 1.0")
    if not distilled:
        _refuse_without_teacher(options)
    if device not in (None, "cpu", "cuda"):
        raise OptionError("device", f"{device!r} is unknown", "give cpu or cuda")


def _check_warmup(options: TuneOptions) -> None:
    warmup = options.warmup
    if not 0 <= warmup < math.inf or (warmup >= 1 and warmup != int(warmup)):
        problem = f"{warmup} is neither a number of steps nor a share of them"
        raise OptionError("--warmup", problem, "give a whole number, or one such as 0.1")
    if warmup >= max(1, options.steps):
        problem = f"{warmup:g} is not less than the number of steps, {options.steps}"
        raise OptionError("--warmup", problem, "give a smaller one, or a share such as 0.1")


def _refuse_without_teacher(options: TuneOptions) -> None:
    for name, default in DISTILLATION_DEFAULTS.items():
        if getattr(options, name) != default:
            raise OptionError(_flag(name), "has no effect without a teacher", "give --teacher too")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
