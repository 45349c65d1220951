"""The options of a probe, checked before a model is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.errors import OptionError
from diffxfer.probing.losses import BATCH_SIZE
from diffxfer.probing.paths import POINTS
from diffxfer.probing.row_data import ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What is measured besides distances, and how.

    Attributes:
        data: the rows; None for none.
        settings: the tasks of lm-eval; None for none.
        alphas: the scales of Δ.
        points: the number of points of a path.
        forward: whether base reads a text, for a better forecast.
        rows: the most rows of the data.
        batch_size: the most rows that go through a model together.
        device: where models run.
        seed: of the choice of rows, of permutations and of resamples.
        output: the folder of the page; None for none.
    """

    data: str | None
    settings: EvalSettings | None
    alphas: tuple[float, ...]
    points: int
    forward: bool
    rows: int
    batch_size: int
    device: str
    seed: int
    output: Path | None

    @property
    def measures(self) -> bool:
        """Whether rows or tasks are given, on which models are measured."""
        return self.data is not None or self.settings is not None

    @property
    def loads_models(self) -> bool:
        """Whether a model is loaded."""
        return self.forward or self.measures


def check_probe_options(
    *,
    data: Path | str | None,
    tasks: Sequence[str] | str | None,
    include_path: Path | str | None,
    limit: float | None,
    alpha: Sequence[float] | float,
    points: int,
    forward: bool,
    rows: int,
    batch_size: int,
    device: str | None,
    seed: int,
    output: Path | str | None,
    stream: bool,
) -> ProbeOptions:
    """Check the arguments of `probe` that concern loaded models.

    Args:
        data: see `ProbeOptions`.
        tasks: names of lm-eval tasks.
        include_path: a folder of custom tasks.
        limit: the most questions of a task.
        alpha: one scale or several.
        points: see `ProbeOptions`.
        forward: see `ProbeOptions`.
        rows: see `ProbeOptions`.
        batch_size: see `ProbeOptions`.
        device: see `ProbeOptions`; None for a GPU if there is one.
        seed: see `ProbeOptions`.
        output: see `ProbeOptions`.
        stream: whether models on the Hub are not downloaded.

    Raises:
        OptionError: if a value is invalid, or an option would do nothing.
        EvaluationError: if PyTorch does not find the device.
    """
    options = ProbeOptions(
        data=None if data is None else str(data),
        settings=_settings(tasks, include_path, limit, batch_size, device),
        alphas=_alphas(alpha),
        points=points,
        forward=forward,
        rows=rows,
        batch_size=batch_size,
        device=device or "cpu",
        seed=seed,
        output=None if output is None else Path(output),
    )
    _refuse_small(options)
    asks = options.settings is not None
    _refuse_idle("--tasks", asks, {"--include-path": include_path, "--limit": limit})
    _refuse_idle("--data or --tasks", options.measures, _changed(options))
    loads = options.loads_models
    _refuse_idle("--data, --tasks or --forward", loads, {"--device": device})
    if loads and stream:
        problem = "the models are loaded for --data, --tasks and --forward, so they are downloaded"
        raise OptionError("--stream", problem, "leave it out")
    return replace(options, device=_device(device, loads))


def _refuse_small(options: ProbeOptions) -> None:
    for name, value, least in (
        ("--points", options.points, 2),
        ("--rows", options.rows, 1),
        ("--batch-size", options.batch_size, 1),
    ):
        if value < least:
            raise OptionError(name, f"{value} is below {least}", f"give {least} or more")


def _changed(options: ProbeOptions) -> dict[str, bool]:
    """The options that concern measured models, and whether each differs from its default."""
    return {
        "--alpha": options.alphas != (1.0,),
        "--points": options.points != POINTS,
        "--rows": options.rows != ROWS,
        "--batch-size": options.batch_size != BATCH_SIZE,
    }


def _alphas(alpha: Sequence[float] | float) -> tuple[float, ...]:
    alphas = (alpha,) if isinstance(alpha, int | float) else alpha
    if not alphas:
        raise OptionError("--alpha", "names no scale", "give one or more, such as 0.6,0.8,1.0")
    for scale in alphas:
        if not math.isfinite(scale):
            raise OptionError("--alpha", f"{scale} is not a finite number", "give one such as 0.8")
    return tuple(dict.fromkeys(map(float, alphas)))


def _refuse_idle(needed: str, is_given: bool, options: Mapping[str, object]) -> None:
    """Refuse options that would do nothing without the options that they need.

    Args:
        needed: the options that they need.
        is_given: whether one of these is given.
        options: the options; those that are None or False are not given.
    """
    if is_given:
        return
    for name, value in options.items():
        if value is not None and value is not False:
            problem = f"applies only where {needed} is given"
            raise OptionError(name, problem, f"leave it out, or give {needed} too")


def _settings(
    tasks: Sequence[str] | str | None,
    include_path: Path | str | None,
    limit: float | None,
    batch_size: int,
    device: str | None,
) -> EvalSettings | None:
    if tasks is None:
        return None
    from diffxfer.evaluation.eval_settings import make_settings

    return make_settings(
        tasks=tasks,
        include_path=None if include_path is None else Path(include_path),
        num_fewshot=None,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype="auto",
        apply_chat_template=False,
        fewshot_as_multiturn=None,
        system_instruction=None,
        gen_kwargs=None,
        backend="hf",
        model_args=None,
        seed=None,  # as `eval` asks by default
        trust_remote_code=False,
    )


def _device(device: str | None, loads: bool) -> str:
    if not loads:
        return "cpu"
    if device is not None:
        from diffxfer.evaluation.harness import check_device_name

        check_device_name(device)
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
